"""What top-p kernels are made of: the search for a threshold, and the union of a group."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_HUGE = tl.constexpr(2.0**100)


@triton.jit
def _search_start(total, p, tokens):
    """Log weight below which all tokens together weigh less than 1 - p of the total."""
    return tl.minimum(tl.log((1.0 - p) * total / tokens) - 0.01, 0.0)


@triton.jit
def _weights(logits, top, ASM: tl.constexpr):
    """exp(logits - top); 0 below 2**-126, which spares two thirds of the instructions."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 x; fma.rn.f32 x, $1, 0f3FB8AA3B, $2; ex2.approx.ftz.f32 $0, x; }",
            "=f,f,f",
            [logits, -top * _LOG2E],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.exp(logits - top)


@triton.jit
def _mass_from(weights, cut, ASM: tl.constexpr):
    """Weights above the cut, 0 for others.

    (weight - cut) * 2**100, saturated, is 0 or 1. It is one instruction of the multiply-add units;
    a comparison and a choice are two of units half as wide.
    """
    if ASM:
        above = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0f71800000, $2;",
            "=f,f,f",
            [weights, -cut * _HUGE],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return weights * above
    return tl.where(weights > cut, weights, 0.0)


@triton.jit
def _as_logit(top, low):
    """The logit of a log weight, less what rounding may have taken from it."""
    return top + low - (1e-5 + 1e-6 * tl.abs(top))


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _load_logits(row_ptr, token, tokens):
    """Logits in float32, -inf from `tokens` on.

    Read in whole vectors of 8, which rows are multiples of: what lies behind is left out.
    """
    stored = (tokens + 7) // 8 * 8
    logits = tl.load(row_ptr + token, token < stored, other=0.0, cache_modifier=".cg")
    return tl.where(token < tokens, logits.to(tl.float32), -float("inf"))


@triton.jit
def threshold_in_registers(
    row_ptr, tokens, p, STEPS: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr
):
    """The logit from which on a row of at most BLOCK logits holds mass p, and what it holds."""
    offset = tl.arange(0, BLOCK)
    logits = _load_logits(row_ptr, offset, tokens)
    top = tl.max(logits, 0)
    weights = _weights(logits, top, ASM)
    total = tl.sum(weights, 0)
    target = p * total
    low = _search_start(total, p, tokens)
    high = total * 0.0
    kept = total
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        mass = tl.sum(_mass_from(weights, tl.exp(middle), ASM), 0)
        enough = mass >= target
        kept = tl.where(enough, mass, kept)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _as_logit(top, low), kept / total


@triton.jit
def find_thresholds(
    rows_ptr,
    tokens,
    p,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
):
    """The logits from which on rows of `tokens` logits hold mass p, two halvings a round.

    Fewer rounds at half as many sums again, for when a round's latency counts most.

    Args:
        rows_ptr: [ROWS] pointers to the rows' logits.
    Returns:
        [ROWS] logits, and [ROWS] shares of the weight from there on.
    """
    offset = tl.arange(0, BLOCK)
    logits = _load_logits(rows_ptr[:, None], offset[None, :], tokens)
    top = tl.max(logits, 1)
    weights = _weights(logits, top[:, None], ASM)
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
                _mass_from(weights, tl.exp(first)[:, None], ASM),
                _mass_from(weights, tl.exp(second)[:, None], ASM),
                _mass_from(weights, tl.exp(third)[:, None], ASM),
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
def threshold_looped(
    row_ptr, tokens, p, STEPS: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr
):
    """The same with the logits read again at every step, for rows that registers cannot hold."""
    offset = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, tokens, BLOCK):
        most = tl.maximum(most, _load_logits(row_ptr, start + offset, tokens))
    top = tl.max(most, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        sums += _weights(_load_logits(row_ptr, start + offset, tokens), top, ASM)
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
            logits = _load_logits(row_ptr, start + offset, tokens)
            sums += _mass_from(_weights(logits, top, ASM), cut, ASM)
        mass = tl.sum(sums, 0)
        enough = mass >= target
        kept = tl.where(enough, mass, kept)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _as_logit(top, low), kept / total


@triton.jit
def keep_any(
    logits_ptr,
    thresholds_ptr,
    pages_ptr,
    positions_ptr,
    first,
    tokens,
    length,
    stride_head,
    G: tl.constexpr,
    PS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which of BLOCK of a (request, KV head)'s candidate tokens any head of the group keeps.

    Args:
        logits_ptr: the group's logits, stride_head apart; thresholds_ptr: its [G] thresholds.
        pages_ptr, positions_ptr: the candidates, physical and logical.
        first: the first token of the block, which begins a page; tokens: behind the last.
        length: tokens of the request.
    Returns:
        [BLOCK] bool, and [BLOCK] int32 token slots.
    """
    candidate = first // PS + tl.arange(0, BLOCK // PS)
    there = candidate * PS < tokens
    page = tl.load(pages_ptr + candidate, there, other=0)
    position = tl.load(positions_ptr + candidate, there, other=0)
    offset = tl.arange(0, PS)[None, :]
    token = candidate[:, None] * PS + offset
    keep_from = tl.minimum((length - 1) // PS * PS, length - RECENT)
    keep = (offset < (SINK - position * PS)[:, None]) | (
        offset >= (keep_from - position * PS)[:, None]
    )
    inside = token < tokens
    for head in tl.static_range(G):
        threshold = tl.load(thresholds_ptr + head, cache_modifier=".cg")
        # Whole pages: what lies behind the last token is read, and left out.
        logit = tl.load(
            logits_ptr + head * stride_head + token, there[:, None], other=-float("inf")
        )
        keep = keep | (logit.to(tl.float32) >= threshold)
    slot = page[:, None] * PS + offset
    return tl.reshape(keep & inside, [BLOCK]), tl.reshape(slot, [BLOCK])
