"""Top-p pruning in Triton: thresholds by bisection, then the union over each group, compacted.

One program a (request, query head) finds its threshold, then one a chunk of a (request, KV head)'s
candidates unites the group's tokens. Nothing is sorted.
"""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import is_interpreted, launch, launch_options, wait_for_inputs
from twilight_sgl.kernels.top_p.parts import (
    keep_any,
    threshold_in_registers,
    threshold_looped,
)

BISECTION_STEPS = 8
_MOST_IN_REGISTERS = 32768
_CHUNK_TOKENS = 2048


@triton.jit
def _threshold_kernel(
    logits_ptr,
    p_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    thresholds_ptr,
    masses_ptr,
    capacity,
    HQ: tl.constexpr,
    G: tl.constexpr,
    STEPS: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
    LOOPED: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    head = tl.program_id(0)
    row = head // HQ
    pair = head // G
    p = tl.load(p_ptr + row)
    tokens = tl.load(candidate_tokens_ptr + pair)
    if tl.load(counts_ptr + pair) > 0:
        row_ptr = logits_ptr + head.to(tl.int64) * capacity
        threshold = -float("inf")
        kept = tl.zeros((), tl.float32) + 1.0
        if p < 1.0:
            if (LARGE == SMALL and not LOOPED) or tokens <= SMALL:
                threshold, kept = threshold_in_registers(row_ptr, tokens, p, STEPS, SMALL, ASM)
            elif LOOPED:
                threshold, kept = threshold_looped(row_ptr, tokens, p, STEPS, SMALL, ASM)
            else:
                threshold, kept = threshold_in_registers(row_ptr, tokens, p, STEPS, LARGE, ASM)
        tl.store(thresholds_ptr + head, threshold)
        tl.store(masses_ptr + head, kept)


@triton.jit
def _union_kernel(
    logits_ptr,
    thresholds_ptr,
    seq_lens_ptr,
    candidate_page_ids_ptr,
    positions_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    slots_ptr,
    kept_tokens_ptr,
    chunk_counts_ptr,
    width,
    num_chunks,
    HK: tl.constexpr,
    G: tl.constexpr,
    PS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    pair = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    start = chunk * BLOCK
    tokens = tl.load(candidate_tokens_ptr + pair)
    length = tl.load(seq_lens_ptr + pair // HK)
    if (tl.load(counts_ptr + pair) > 0) & (start < tokens):
        keep, token_slot = keep_any(
            logits_ptr + pair * G * (width * PS),
            thresholds_ptr + pair * G,
            candidate_page_ids_ptr + pair * width,
            positions_ptr + pair * width,
            start,
            tokens,
            length,
            width * PS,
            G,
            PS,
            SINK,
            RECENT,
            BLOCK,
        )
        chosen = keep.to(tl.int32)
        kept = tl.sum(chosen, 0)
        # Publish the count, one up so that 0 means not yet, and wait for those of the chunks
        # before. They were launched before this one, so they run or have run.
        mine_ptr = chunk_counts_ptr + pair * num_chunks
        tl.atomic_xchg(mine_ptr + chunk, kept + 1, sem="relaxed")
        other = tl.arange(0, CHUNKS_PAD)
        before = tl.zeros([CHUNKS_PAD], tl.int32)
        waiting = chunk
        while waiting > 0:
            before = tl.load(mine_ptr + other, other < chunk, other=0, volatile=True)
            waiting = chunk - tl.sum((before > 0).to(tl.int32), 0)
        first = tl.sum(before, 0) - chunk
        place = first + tl.cumsum(chosen, 0) - 1
        tl.store(slots_ptr + pair * (width * PS) + place, token_slot, keep)
        if start + BLOCK >= tokens:
            tl.store(kept_tokens_ptr + pair, first + kept)


def union_chunks(capacity: int) -> int:
    """Chunks that `unite_kept` cuts the candidates' tokens of a (request, KV head) into."""
    return triton.cdiv(capacity, _chunk_tokens())


def _chunk_tokens() -> int:
    return 64 if is_interpreted() else _CHUNK_TOKENS


def _warps(block: int, rows: int) -> int:
    if block > 8192:
        return 16 if rows <= 64 else 8
    return 8 if block > 2048 and rows <= 1024 else 4


def top_p_thresholds(
    logits: torch.Tensor,
    p: torch.Tensor,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    thresholds: torch.Tensor,
    masses: torch.Tensor,
    *,
    steps: int = BISECTION_STEPS,
) -> None:
    """Find the logit from which on a query head's candidates hold mass p.

    The search (Twilight, arXiv 2502.02770, algorithm 1) runs in log weight, between the largest
    and the one below which all tokens together cannot weigh 1 - p of the total. So `steps`
    halvings leave it at most ln(tokens / (1 - p)) / 2**steps below the exact one: with 8, less
    than 5.4 % in weight for 32k candidates at p = 0.95, about 1 % more tokens than
    needed. The kept mass is at least p up to float32 rounding.

    Args:
        logits: [B, HQ, C * PS] float16 or float32 from `estimate_logits`.
        p: [B] float32; 1 or more keeps every candidate.
        counts, candidate_tokens: [B, HK] int32 from `select_pages`; rows with count 0 are
            skipped.
        thresholds: [B, HQ] float32, written.
        masses: [B, HQ] float32, written: the share of the candidates' weight from the threshold
            on; 1 if the search never left its start, below which tokens weigh less than 1 - p.
    """
    batch, heads_q, capacity = logits.shape
    padded = max(16, triton.next_power_of_2(capacity))
    large = min(padded, _MOST_IN_REGISTERS)
    launch(_threshold_kernel, batch * heads_q)(
        logits,
        p,
        counts,
        candidate_tokens,
        thresholds,
        masses,
        capacity,
        HQ=heads_q,
        G=heads_q // counts.shape[1],
        STEPS=steps,
        SMALL=min(large, 8192),
        LARGE=large,
        LOOPED=padded > _MOST_IN_REGISTERS,
        ASM=not is_interpreted(),
        **launch_options(_warps(large, batch * heads_q)),
    )


def unite_kept(
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    seq_lens: torch.Tensor,
    candidate_page_ids: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    kept_token_slots: torch.Tensor,
    kept_tokens: torch.Tensor,
    chunk_counts: torch.Tensor,
    *,
    page_size: int,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    """List the tokens that any query head of a group keeps; what `reference.keep_union` does.

    Sink, recent and open tokens are kept whatever their weight.

    Args:
        logits: [B, HQ, C * PS]; thresholds: [B, HQ] float32 from `top_p_thresholds`.
        seq_lens: [B] int32.
        candidate_page_ids, positions, counts, candidate_tokens: from `select_pages`; rows with
            count 0 are skipped.
        kept_token_slots: [B, HK, C * PS] int32, written: physical slots in the order of the
            candidates; the rest keeps what it held.
        kept_tokens: [B, HK] int32, written.
        chunk_counts: [B, HK, union_chunks(C * PS)] int32 zeros from `select_pages`, overwritten.
    """
    batch, heads_q, _ = logits.shape
    heads_kv, num_chunks = chunk_counts.shape[1:]
    launch(_union_kernel, batch * heads_kv * num_chunks)(
        logits,
        thresholds,
        seq_lens,
        candidate_page_ids,
        positions,
        counts,
        candidate_tokens,
        kept_token_slots,
        kept_tokens,
        chunk_counts,
        candidate_page_ids.shape[-1],
        num_chunks,
        HK=heads_kv,
        G=heads_q // heads_kv,
        PS=page_size,
        SINK=sink_tokens,
        RECENT=recent_tokens,
        BLOCK=_chunk_tokens(),
        CHUNKS_PAD=triton.next_power_of_2(num_chunks),
        **launch_options(8),
    )
