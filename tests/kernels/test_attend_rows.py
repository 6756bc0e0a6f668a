"""Attention over whole rows against its reference: the interpreter on the CPU, or a GPU."""

import dataclasses

import pytest
import torch
from cases import Case
from rows import check_rows

from twilight_sgl.kernels.attend import rows as kernel
from twilight_sgl.kernels.attend import triton as workspace_module

CASES = [
    Case("awkward-lengths", (1, 15, 16, 17, 0, 33, 140)),
    Case("one-row", (140,), 7, 1),
    Case("g1-d128", (65, 17), 2, 2, 128),
    Case("g7-d80", (65, 17), 7, 1, 80),
    Case("g4-d128-v64", (65, 17), 8, 2, 128, dim_v=64),
    Case("d256", (40,), 2, 1, 256),
    Case("ps64", (63, 64, 65, 200), page_size=64),
    Case("padded-rows-only", (0, 0)),
    Case("more-rows-than-programs", (3, 0, 20, 1, 0, 0, 17, 0)),
    Case("one-dominant-token", (140,), q_scale=12.0),
    Case("soft-cap", (65, 17), logit_cap=2.0, q_scale=3.0),
    Case("sinks", (140, 90, 16, 0), 6, 2, sink_logits=2.0),
    Case("sinks-outweigh-tokens", (90, 33), sink_logits=40.0, dtype=torch.bfloat16),
    Case("bf16", (90, 17), dtype=torch.bfloat16),
    Case("fp16", (90, 17), dtype=torch.float16),
    Case("fp8-cache", (90, 17), dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_equal_reference(case: Case) -> None:
    check_rows(case)


@pytest.mark.parametrize("programs", [1, 2, 7, 40])
def test_any_number_of_programs_shares_out_the_tiles(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kernel, workspace_module):
        monkeypatch.setattr(module, "grid_programs", lambda *_: programs)
    case = CASES[0]
    check_rows(dataclasses.replace(case, lengths=(300, *case.lengths)))
