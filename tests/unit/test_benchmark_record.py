"""A recorded trace holds what attention was given: its output follows from it."""

import argparse
import re
from pathlib import Path

import pytest
import torch

from twilight_sgl.benchmark.record import (
    FACT,
    PASS_KEY,
    QUESTION,
    check_context,
    main,
    parse_layers,
    parse_tokens,
    python_text,
    record_step,
    retrieval_context,
)
from twilight_sgl.errors import TwilightError
from twilight_sgl.kernels.attend.reference import attend

TOKENS = 75


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # not hidden_size / heads, as in Qwen3
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def attention_outputs(model: torch.nn.Module) -> tuple[dict[int, torch.Tensor], list]:
    """What each layer's attention hands to its output projection, of the last call."""
    outputs: dict[int, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):

        def keep(_module: torch.nn.Module, inputs: tuple, index: int = index) -> None:
            outputs[index] = inputs[0][0, -1].clone()

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(keep))
    return outputs, hooks


@pytest.mark.parametrize("chunk_tokens", [16, 1000], ids=["chunks", "whole"])
def test_attention_over_the_record_is_the_model_s(
    model: torch.nn.Module, chunk_tokens: int
) -> None:
    token_ids = torch.randint(128, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    outputs, hooks = attention_outputs(model)
    try:
        layers, predicted = record_step(model, token_ids, chunk_tokens=chunk_tokens)
        decoded = {layer: output.clone() for layer, output in outputs.items()}
        with torch.no_grad():
            logits = model(torch.tensor([token_ids])).logits
    finally:
        for hook in hooks:
            hook.remove()
    assert predicted == logits[0, -1].argmax()
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    for layer in layers:
        assert (layer["q"].shape, layer["q"].dtype) == ((4, 32), torch.bfloat16)
        assert layer["keys"].shape == layer["values"].shape == (TOKENS, 2, 32)
        out = attend(
            layer["q"][None],
            layer["keys"][None],
            layer["values"][None],
            torch.arange(TOKENS).expand(1, 2, -1),
            torch.full((1, 2), TOKENS),
            sm_scale=32**-0.5,
        ).flatten()
        for expected in (decoded[layer["layer"]], outputs[layer["layer"]]):
            assert (out - expected).norm() < 0.02 * expected.norm()


def test_a_model_s_own_scale_is_folded_into_the_queries(model: torch.nn.Module) -> None:
    attention = model.model.layers[1].self_attn
    token_ids = list(range(20))
    plain = record_step(model, token_ids, layers=[0, 1])[0]
    attention.scaling *= 2
    try:
        scaled = record_step(model, token_ids, layers=[0, 1])[0]
    finally:
        attention.scaling /= 2
    assert torch.equal(scaled[0]["q"], plain[0]["q"])
    assert torch.equal(scaled[1]["q"], plain[1]["q"] * 2)


def test_recording_leaves_the_model_as_it_was(model: torch.nn.Module) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    layers, _ = record_step(model, list(range(20)), layers=[2, 0])
    assert [layer["layer"] for layer in layers] == [2, 0]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_layers_that_are_not_there_are_named(model: torch.nn.Module) -> None:
    with pytest.raises(TwilightError, match=r"--layers: \[3\] not there; .* layers 0 to 2"):
        record_step(model, list(range(20)), layers=[0, 3])


def test_a_sliding_window_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    with pytest.raises(TwilightError, match=r"attends to .* of 20 tokens .* full attention"):
        record_step(transformers.MistralForCausalLM(config).eval(), list(range(20)))


def by_character(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_the_context_tells_a_pass_key_and_asks_for_it() -> None:
    ids = retrieval_context(by_character, "abc " * 500, 1000, source="text")
    assert len(ids) == 1000
    text = "".join(map(chr, ids))
    assert 0 < text.index(FACT) < 200
    assert text.endswith(QUESTION)
    assert text.count(PASS_KEY) == FACT.count(PASS_KEY) == 2


def test_context_errors_name_the_remedy() -> None:
    with pytest.raises(TwilightError, match=r"--text a\.txt has 8 tokens, --context 1000 needs"):
        retrieval_context(by_character, "too few.", 1000, source="--text a.txt")
    with pytest.raises(TwilightError, match="--context 10 leaves no room"):
        retrieval_context(by_character, "abc", 10, source="text")
    with pytest.raises(TwilightError, match="--context 9000 exceeds the 8192 tokens of tiny"):
        check_context(9000, 8192, "tiny")
    assert check_context(None, 8192, "tiny") == 8192
    assert check_context(None, 1 << 20, "large") == 32768


def test_python_s_own_text_is_long_enough() -> None:
    assert len(python_text(2_000_000)) > 2_000_000


def test_counts_and_layers_are_read() -> None:
    assert [parse_tokens(value) for value in ("28k", "4096", "1.5K")] == [28672, 4096, 1536]
    assert parse_layers("0,1,12") == (0, 1, 12)
    for parse, value in ((parse_tokens, "many"), (parse_tokens, "0"), (parse_layers, "0,x")):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(value)


@pytest.mark.parametrize(
    ("model_path", "text", "said"),
    [
        ("gone", None, "--model-path .*gone is not there"),
        (".", "gone.txt", r"--text .*gone\.txt is not a file"),
        (".", None, "--model-path .* could not be loaded"),
    ],
    ids=["no-model", "no-text", "not-a-model"],
)
def test_bad_input_is_said_not_raised(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model_path: str,
    text: str | None,
    said: str,
) -> None:
    args = argparse.Namespace(
        model_path=tmp_path / model_path,
        text=None if text is None else tmp_path / text,
        context=None,
        layers=None,
        out=tmp_path / "trace.pt",
    )
    assert main(args) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not args.out.exists()
