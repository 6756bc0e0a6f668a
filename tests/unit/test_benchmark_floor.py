"""What a decode step must read, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2Config

from twilight_sgl.benchmark.floor import Model, add_floors, step_bytes

MODEL = Model(weight_bytes=1000, layers=4, heads_kv=2, dim=64, dtype=torch.bfloat16)
TOKENS = 3 * 1024
ATTENDED = 2 * 64 * 2  # bytes of a token's key and value
CONFIG = {
    "pruner": "top_p",
    "estimator": "int4",
    "bounds": "float8",
    "page_size": 16,
    "skip_layers": [0, 9],
}
SPENT = {"candidate_share": 0.25, "kept_share": 0.05}


def row(**changes: Any) -> dict[str, Any]:
    dense = {"twilight": None, "budget": None, "steps": None, "gpus": 1, "kv_cache_dtype": "auto"}
    load = {"load": "3x1k", "requests": 3, "prompt_tokens": 1024, "shared_prefix_tokens": 0}
    return {**load, **dense, **changes}


def sparse(dense_steps: int = 0, **config: Any) -> dict[str, Any]:
    steps = {"decode": 10, "dense": dense_steps}
    return row(twilight=CONFIG | config, budget=SPENT, steps=steps)


def test_dense_attention_reads_weights_and_all_keys_and_values() -> None:
    assert step_bytes(MODEL, row()) == 1000 + TOKENS * 2 * 4 * ATTENDED
    assert step_bytes(MODEL, row(kv_cache_dtype="fp8_e4m3")) == 1000 + TOKENS * 2 * 4 * ATTENDED / 2


@pytest.mark.parametrize(
    ("config", "weighed", "bounds"),
    [
        ({}, 36, 8),
        ({"estimator": "exact"}, 128, 8),
        ({"pruner": "none"}, 0, 8),
        ({"bounds": "keys"}, 36, 16),
    ],
)
def test_layers_that_select_read_bounds_candidates_and_what_they_keep(
    config: dict[str, Any], weighed: float, bounds: float
) -> None:
    selecting = bounds + 0.25 * weighed + 0.05 * ATTENDED
    expected = 1000 + TOKENS * 2 * (ATTENDED + 3 * selecting)
    assert step_bytes(MODEL, sparse(**config)) == pytest.approx(expected)


def test_what_requests_share_is_read_once() -> None:
    apart, shared = row(prompt_tokens=24), row(shared_prefix_tokens=1000)
    of_prefix = 1000 * 2 * 4 * ATTENDED
    assert step_bytes(MODEL, shared) == step_bytes(MODEL, apart) + of_prefix
    keeps = step_bytes(MODEL, sparse() | {"requests": 1, "prompt_tokens": 1000 + 3 * 24})
    assert step_bytes(MODEL, sparse() | {"shared_prefix_tokens": 1000}) == pytest.approx(keeps)


def test_dense_steps_count_for_their_share() -> None:
    half = (step_bytes(MODEL, sparse()) + step_bytes(MODEL, row())) / 2
    assert step_bytes(MODEL, sparse(5)) == pytest.approx(half)
    nothing = dict.fromkeys(SPENT)
    all_dense = sparse(10) | {"budget": nothing}
    assert step_bytes(MODEL, all_dense) == step_bytes(MODEL, row())


def test_rows_get_a_time_where_it_is_known() -> None:
    rows = [row(), row(gpus=2)]
    add_floors(rows, MODEL, 1e9)
    assert rows[0]["floor_ms"] == pytest.approx(rows[0]["floor_bytes"] / 1e6)
    assert rows[1]["floor_ms"] is None and rows[1]["floor_bytes"] is None
    for model, bandwidth in ((None, 1e9), (MODEL, None)):
        add_floors(rows, model, bandwidth)
        assert [each["floor_ms"] for each in rows] == [None, None]


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_only_embeds_is_not_read(tied: bool, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(9000))
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        vocab_size=100, num_hidden_layers=3, dtype="bfloat16", tie_word_embeddings=tied, **shape
    )
    expected = Model(9000 if tied else 9000 - 100 * 8 * 2, 3, 1, 4, torch.bfloat16)
    assert Model.read(tmp_path, config) == expected
    assert Model.read(tmp_path / "nowhere", config) is None


@pytest.mark.parametrize(
    "config",
    [MixtralConfig(), Qwen2Config(use_sliding_window=True, max_window_layers=2)],
    ids=["experts", "windows"],
)
def test_what_a_step_reads_of_others_is_not_known(config: PretrainedConfig, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(9000))
    assert Model.read(tmp_path, config) is None
