"""Top-p pruning in Triton: thresholds by bisection, then the union over each group, compacted.

One program a (request, query head) finds its threshold, then one a chunk of a (request, KV head)'s
candidates unites the group's tokens. Nothing is sorted.
"""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import is_interpreted, launch_options, wait_for_inputs

BISECTION_STEPS = 8
_MOST_IN_REGISTERS = 32768
_CHUNK_TOKENS = 2048


@triton.jit
def _search_start(total, p, tokens):
    """Log weight below which all tokens together weigh less than 1 - p of the total."""
    return tl.minimum(tl.log((1.0 - p) * total / tokens) - 0.01, 0.0)


@triton.jit
def _mass_from(weights, cut):
    return tl.where(weights >= cut, weights, 0.0)


@triton.jit
def _as_logit(top, low):
    """The logit of a log weight, less what rounding may have taken from it."""
    return top + low - (1e-5 + 1e-6 * tl.abs(top))


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _threshold_in_registers(row_ptr, tokens, p, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + offset, offset < tokens, other=-float("inf")).to(tl.float32)
    top = tl.max(logits, 0)
    weights = tl.exp(logits - top)
    total = tl.sum(weights, 0)
    target = p * total
    low = _search_start(total, p, tokens)
    high = total * 0.0
    kept = total
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        mass = tl.sum(_mass_from(weights, tl.exp(middle)), 0)
        enough = mass >= target
        kept = tl.where(enough, mass, kept)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _as_logit(top, low), kept / total


@triton.jit
def find_thresholds(
    rows_ptr, tokens, p, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The logits from which on rows of `tokens` logits hold mass p, two halvings a round.

    Fewer rounds at half as many sums again, for when a round's latency counts most.

    Args:
        rows_ptr: [ROWS] pointers to the rows' logits.
    Returns:
        [ROWS] logits, and [ROWS] shares of the weight from there on.
    """
    offset = tl.arange(0, BLOCK)
    logits = tl.load(
        rows_ptr[:, None] + offset[None, :],
        (offset < tokens)[None, :],
        other=-float("inf"),
        cache_modifier=".cg",
    ).to(tl.float32)
    top = tl.max(logits, 1)
    weights = tl.exp(logits - top[:, None])
    total = tl.sum(weights, 1)
    target = p * total
    low = _search_start(total, p, tokens)
    high = total * 0.0
    kept = total
    for _ in range((STEPS + 1) // 2):
        quarter = (high - low) * 0.25
        first = low + quarter
        second = low + quarter * 2
        third = low + quarter * 3
        mass1, mass2, mass3 = tl.reduce(
            (
                _mass_from(weights, tl.exp(first)[:, None]),
                _mass_from(weights, tl.exp(second)[:, None]),
                _mass_from(weights, tl.exp(third)[:, None]),
            ),
            1,
            _add3,
        )
        low = tl.where(mass1 >= target, first, low)
        low = tl.where(mass2 >= target, second, low)
        low = tl.where(mass3 >= target, third, low)
        kept = tl.where(mass1 >= target, mass1, kept)
        kept = tl.where(mass2 >= target, mass2, kept)
        kept = tl.where(mass3 >= target, mass3, kept)
        high = low + quarter
    prunes = p < 1.0
    found = tl.where(prunes, _as_logit(top, low), -float("inf"))
    return found, tl.where(prunes, kept / total, 1.0)


@triton.jit
def _threshold_looped(row_ptr, tokens, p, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The same with the logits read again at every step, for rows that registers cannot hold."""
    offset = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, tokens, BLOCK):
        logits = tl.load(row_ptr + start + offset, start + offset < tokens, other=-float("inf"))
        most = tl.maximum(most, logits.to(tl.float32))
    top = tl.max(most, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        logits = tl.load(row_ptr + start + offset, start + offset < tokens, other=-float("inf"))
        sums += tl.exp(logits.to(tl.float32) - top)
    total = tl.sum(sums, 0)
    target = p * total
    low = _search_start(total, p, tokens)
    high = total * 0.0
    kept = total
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        cut = tl.exp(middle)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, tokens, BLOCK):
            logits = tl.load(row_ptr + start + offset, start + offset < tokens, other=-float("inf"))
            sums += _mass_from(tl.exp(logits.to(tl.float32) - top), cut)
        mass = tl.sum(sums, 0)
        enough = mass >= target
        kept = tl.where(enough, mass, kept)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _as_logit(top, low), kept / total


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
                threshold, kept = _threshold_in_registers(row_ptr, tokens, p, STEPS, SMALL)
            elif LOOPED:
                threshold, kept = _threshold_looped(row_ptr, tokens, p, STEPS, SMALL)
            else:
                threshold, kept = _threshold_in_registers(row_ptr, tokens, p, STEPS, LARGE)
        tl.store(thresholds_ptr + head, threshold)
        tl.store(masses_ptr + head, kept)


@triton.jit
def keep_any(
    logits_ptr,
    thresholds_ptr,
    token,
    inside,
    tokens,
    length,
    stride_head,
    G: tl.constexpr,
    PS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
):
    """Which of a (request, KV head)'s candidate tokens any head of the group keeps.

    Args:
        logits_ptr: the group's logits, stride_head apart; thresholds_ptr: its [G] thresholds.
        token: [BLOCK] candidates' tokens, `inside` where they exist, of `tokens` in all.
        length: tokens of the request.
    """
    # Sink and recent pages are candidates, so the forced tokens are the first and the last.
    forced_last = tl.maximum((length - 1) % PS + 1, tl.minimum(RECENT, length))
    keep = (token < SINK) | (token >= tokens - forced_last)
    for head in tl.static_range(G):
        threshold = tl.load(thresholds_ptr + head, cache_modifier=".cg")
        logit = tl.load(logits_ptr + head * stride_head + token, inside, other=-float("inf"))
        keep = keep | (logit.to(tl.float32) >= threshold)
    return keep & inside


@triton.jit
def _union_kernel(
    logits_ptr,
    thresholds_ptr,
    seq_lens_ptr,
    candidate_page_ids_ptr,
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
        token = start + tl.arange(0, BLOCK)
        keep = keep_any(
            logits_ptr + pair * G * (width * PS),
            thresholds_ptr + pair * G,
            token,
            token < tokens,
            tokens,
            length,
            width * PS,
            G,
            PS,
            SINK,
            RECENT,
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
        slot = first + tl.cumsum(chosen, 0) - 1
        pages_ptr = candidate_page_ids_ptr + pair * width
        page = tl.load(pages_ptr + token // PS, keep, other=0)
        tl.store(slots_ptr + pair * (width * PS) + slot, page * PS + token % PS, keep)
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
    _threshold_kernel[(batch * heads_q,)](
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
        **launch_options(_warps(large, batch * heads_q)),
    )


def unite_kept(
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    seq_lens: torch.Tensor,
    candidate_page_ids: torch.Tensor,
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
        candidate_page_ids, counts, candidate_tokens: from `select_pages`; rows with count 0 are
            skipped.
        kept_token_slots: [B, HK, C * PS] int32, written: physical slots in ascending token
            position; the rest keeps what it held.
        kept_tokens: [B, HK] int32, written.
        chunk_counts: [B, HK, union_chunks(C * PS)] int32 zeros from `select_pages`, overwritten.
    """
    batch, heads_q, _ = logits.shape
    heads_kv, num_chunks = chunk_counts.shape[1:]
    _union_kernel[(batch * heads_kv * num_chunks,)](
        logits,
        thresholds,
        seq_lens,
        candidate_page_ids,
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
