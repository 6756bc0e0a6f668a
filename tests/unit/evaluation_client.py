"""Fixtures of the evaluation's tests: a tokenizer, and the command on a server."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from evaluation_server import EvaluationServer

from twilight_sgl.evaluation.__main__ import main

Evaluate = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer whose tokens are words, and that puts one before every text."""
    words = {"<s>": 0, "?": 1, "it": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="?"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Runs the command on a server, into `out.json`; tasks first, then other flags."""

    def run(server: EvaluationServer | str, *arguments: str) -> int:
        url = server if isinstance(server, str) else server.url
        given = ["--url", url, "--json", str(tmp_path / "out.json"), *arguments]
        return main([*given, "--context", "600"] if "--context" not in arguments else given)

    return run
