"""Sizes of prompts, kept in a file so that other runs need not search for them.

Fitting a prompt to its context takes several passes of the tokenizer, which at long contexts cost
more than a server's answer. A prompt's size says all, since the prompt is drawn from its seed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation import text
from twilight_sgl.evaluation.records import Key
from twilight_sgl.evaluation.tasks import Sample, make_sample

_PROBE_SENTENCES = 200


class Prompts:
    """Makes samples, and remembers their sizes in a file if one is given.

    Args:
        path: JSON lines, begun if not there; None to remember nothing.
        count_tokens: tokens of a prompt, with what the tokenizer adds.
    Raises:
        TwilightError: the file is none of sizes or of another tokenizer or text.
    """

    def __init__(self, path: Path | None, count_tokens: Callable[[str], int]) -> None:
        self._count_tokens, self._path = count_tokens, path
        self._known: dict[Key, dict[str, Any]] = {}
        if path is None:
            return
        filler = text.sentences()[:_PROBE_SENTENCES]
        about = {"text": text.text_hash(), "sentence_tokens": [count_tokens(s) for s in filler]}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            head, *rows = [json.loads(line) for line in lines] or [None]
            self._known = {(r["task"], r["context"], r["seed"], r["index"]): r for r in rows}
            if head is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        except OSError as error:
            raise TwilightError(f"--prompts {path} cannot be used: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise TwilightError(
                f"--prompts {path} is no file of prompt sizes ({error}): delete it, or pass another"
            ) from error
        if head is not None and head != about:
            raise TwilightError(
                f"--prompts {path} is of another tokenizer or Python: pass another file"
            )

    def make(self, task: str, context: int, seed: int, index: int) -> Sample:
        """The sample of (task, context, seed, index), as `make_sample` makes it.

        Raises:
            TwilightError: the context is too small for the task, or too large for its words.
        """
        key = (task, context, seed, index)
        known = self._known.get(key)
        if known is not None:
            sample = make_sample(*key, self._count_tokens, (known["size"], known["prompt_tokens"]))
            if prompt_hash(sample) == known["prompt_sha256"]:
                return sample
        sample = make_sample(*key, self._count_tokens)
        if self._path is not None:
            row = dict(zip(("task", "context", "seed", "index"), key, strict=True))
            row |= {"size": sample.size, "prompt_tokens": sample.prompt_tokens}
            row["prompt_sha256"] = prompt_hash(sample)
            self._known[key] = row
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return sample


def prompt_hash(sample: Sample) -> str:
    """SHA-256 of a prompt, in hex."""
    return hashlib.sha256(sample.prompt.encode()).hexdigest()
