"""Attention over whole rows, checked against its reference."""

import torch
from cases import DEVICE, Case, Drawn, draw, same_bits, take_token

from twilight_sgl.kernels.attend import reference
from twilight_sgl.kernels.attend.rows import attend_rows
from twilight_sgl.kernels.attend.triton import AttendWorkspace


def every_slot(drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, HK, T * PS] slots of a row's tokens, and [B, HK] how many there are."""
    page_size, heads_kv = drawn.cache.keys.shape[1:3]
    within = torch.arange(page_size, device=DEVICE)
    slots = (drawn.plan.page_ids.unsqueeze(-1) * page_size + within).flatten(1)
    lengths = drawn.plan.seq_lens
    return (each.unsqueeze(1).expand(-1, heads_kv, *each.shape[1:]) for each in (slots, lengths))


def check_rows(case: Case) -> None:
    drawn = draw(case)
    without, token = take_token(drawn)
    batch, dim_v = len(case.lengths), case.dim_v or case.dim
    scales = {"sm_scale": case.dim**-0.5, "logit_cap": case.logit_cap, "sinks": drawn.sinks}
    expected = reference.attend(
        drawn.q, drawn.cache.keys, drawn.cache.values, *every_slot(drawn), **scales
    )
    workspace = AttendWorkspace(batch, case.heads_q, case.heads_kv, dim_v, torch.device(DEVICE))
    outputs = []
    for written in (token, None):  # the second finds in the cache what the first wrote
        out = torch.full_like(expected, float("nan"), dtype=case.dtype)
        attend_rows(
            drawn.q,
            without.cache.keys,
            without.cache.values,
            drawn.plan.page_ids,
            drawn.plan.seq_lens,
            workspace,
            out,
            written,
            **scales,
        )
        outputs.append(out)
    assert same_bits(without.cache.keys, drawn.cache.keys)
    assert same_bits(without.cache.values, drawn.cache.values)
    tolerance = 1e-3 if case.dtype == torch.float32 else 1e-2
    scale = expected.norm().clamp(min=1e-6)
    assert (outputs[0].float() - expected).norm() / scale < tolerance
    assert torch.equal(*outputs)
    assert not workspace.arrivals.any()
