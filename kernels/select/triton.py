"""Candidate pages in Triton: a search for the score of the last page that fits, without a sort."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.estimate.parts import quantize_query
from twilight_sgl.kernels.launch import is_interpreted, launch_options, wait_for_inputs
from twilight_sgl.kernels.select.reference import budget_pages

_LARGEST = tl.constexpr(1e38)


def budget_table(
    columns: int, budget: float, page_size: int, least_tokens: int, device: torch.device
) -> torch.Tensor:
    """[T + 1] int32: pages that a request of n pages may name, for n up to T = columns."""
    pages = torch.arange(columns + 1)
    return budget_pages(pages, budget, page_size, least_tokens).int().to(device)


def max_candidate_pages(
    columns: int,
    budget: float,
    page_size: int,
    least_tokens: int,
    sink_tokens: int,
    recent_tokens: int,
) -> int:
    """The most candidate pages that a sparse row of up to `columns` pages can get."""
    pages = budget_pages(torch.tensor([columns]), budget, page_size, least_tokens)
    forced = -(-sink_tokens // page_size) + -(-max(recent_tokens, 1) // page_size) + 1
    return min(columns, max(int(pages), forced))


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _spread(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.minimum(a0, b0), tl.maximum(a1, b1), a2 + b2, a3 + b3


@triton.jit
def _search_threshold(scores, scored, num_scored, k):
    """Bounds low < high with at least k scores from low on and fewer than k from high on.

    Three thresholds a round, two of their counts in one integer, until exactly k scores are at
    or above low or the bounds are as near as float32 can tell at the scale of the scores. The
    first three lie where a normal distribution would have the k-th score.

    Returns:
        low, high, the number of scores from low on, and from high on.
    """
    infinity = float("inf")
    real = tl.where(scored, scores, 0.0)
    low, high, total, squares = tl.reduce(
        (
            tl.where(scored, scores, infinity),
            tl.where(scored, scores, -infinity),
            real,
            real * real,
        ),
        0,
        _spread,
    )
    scores = tl.where(scored, scores, -infinity)
    high = high + tl.maximum(tl.abs(high), tl.abs(low)) * 1e-6 + 1e-30  # above all
    count = num_scored
    above = num_scored * 0
    rounds = 0
    number = num_scored.to(tl.float32)
    mean = total / number
    deviation = tl.sqrt(tl.maximum(squares / number - mean * mean, 0.0))
    below = tl.minimum(tl.maximum(1.0 - k / number, 1e-6), 1.0)
    # Quantile of the normal distribution (Joiner and Rosenblatt, 1971).
    quantile = (tl.exp2(tl.log2(below) * 0.14) - tl.exp2(tl.log2(k / number) * 0.14)) * 4.91
    second = mean + deviation * quantile
    first = second - deviation * 0.1
    third = second + deviation * 0.1
    quarter = (high - low) * 0.25
    guessed = (first > low) & (third < high)  # no if anything is not finite
    first = tl.where(guessed, first, low + quarter)
    second = tl.where(guessed, second, low + quarter * 2)
    third = tl.where(guessed, third, low + quarter * 3)
    while (count > k) & (rounds < 15):
        low_counts, threes = tl.reduce(
            (
                tl.where(scores >= first, 1, 0) + tl.where(scores >= second, 65536, 0),
                (scores >= third).to(tl.int32),
            ),
            0,
            _add2,
        )
        ones = low_counts & 0xFFFF
        twos = (low_counts >> 16) & 0xFFFF
        enough1 = ones >= k
        enough2 = twos >= k
        enough3 = threes >= k
        if enough2:
            high = tl.where(enough3, high, third)
            above = tl.where(enough3, above, threes)
            low = tl.where(enough3, third, second)
            count = tl.where(enough3, threes, twos)
        else:
            high = tl.where(enough1, second, first)
            above = tl.where(enough1, twos, ones)
            low = tl.where(enough1, first, low)
            count = tl.where(enough1, ones, count)
        quarter = (high - low) * 0.25
        first = low + quarter
        second = low + quarter * 2
        third = low + quarter * 3
        rounds += 1
    return low, high, count, above


@triton.jit
def _load_scores(scores_ptr, position, scored):
    score = tl.load(scores_ptr + position, scored, other=0.0, cache_modifier=".cg")
    score = tl.where(score == score, score, -_LARGEST)  # keys that are not finite
    return tl.minimum(tl.maximum(score, -_LARGEST), _LARGEST)


@triton.jit
def _kinds(
    scores_ptr, position, length, SINK: tl.constexpr, RECENT: tl.constexpr, PS: tl.constexpr
):
    """Which pages are always candidates and which by score, and the latter's scores."""
    sink_below: tl.constexpr = (SINK + PS - 1) // PS
    recent_from = tl.maximum(length - RECENT, 0) // PS
    exists = position < (length + PS - 1) // PS
    forced = exists & ((position < sink_below) | (position >= recent_from))
    scored = exists & (~forced)
    return forced, scored, _load_scores(scores_ptr, position, scored)


@triton.jit
def _cut_scores(
    score,
    scored,
    length,
    budget_ptr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
):
    """What a row's candidates score: those from high on, and the first `spare` from low on.

    Returns:
        low, high, spare, and how many candidates there are, forced ones included.
    """
    pages = (length + PS - 1) // PS
    sink_below: tl.constexpr = (SINK + PS - 1) // PS
    num_sink = tl.minimum(sink_below, pages)
    recent_from = tl.maximum(length - RECENT, 0) // PS
    num_forced = num_sink + pages - tl.maximum(recent_from, num_sink)
    count = tl.maximum(tl.load(budget_ptr + pages), num_forced)
    room = count - num_forced
    low = tl.zeros((), tl.float32) + 2.0 * _LARGEST
    high = low
    spare = room * 0
    if room > 0:
        low, high, found, above = _search_threshold(score, scored, pages - num_forced, room)
        if found <= room:
            high = low
        else:
            spare = room - above
    return low, high, spare, count


@triton.jit
def choose_pages(
    scores_ptr,
    length,
    budget_ptr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
):
    """A sparse row's candidates for one KV head: its best pages and those always kept.

    Args:
        scores_ptr: float32 scores of the row's full pages.
        length: tokens of the row, at least 1.
    Returns:
        [COLUMNS_PAD] whether each page is a candidate, and how many are.
    """
    position = tl.arange(0, COLUMNS_PAD)
    forced, scored, score = _kinds(scores_ptr, position, length, SINK, RECENT, PS)
    low, high, spare, count = _cut_scores(score, scored, length, budget_ptr, SINK, RECENT, PS)
    good = scored & (score >= high)
    if spare > 0:  # of equal scores the earlier pages
        ties = scored & (score >= low) & (score < high)
        good = good | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= spare))
    return forced | good, count


@triton.jit
def choose_slice(
    scores_ptr,
    length,
    budget_ptr,
    first,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    SLICE: tl.constexpr,
):
    """As `choose_pages` does, of the SLICE pages from `first` on, so that others list the rest.

    The search is over all scores all the same: waiting for each other would take longer.

    Returns:
        [SLICE] whether each page is a candidate, [SLICE] its place among all candidates, and how
        many there are.
    """
    position = tl.arange(0, COLUMNS_PAD)
    forced, scored, score = _kinds(scores_ptr, position, length, SINK, RECENT, PS)
    low, high, spare, count = _cut_scores(score, scored, length, budget_ptr, SINK, RECENT, PS)
    before = position < first
    chosen_before, ties_before = tl.reduce(
        (
            (before & (forced | (scored & (score >= high)))).to(tl.int32),
            (before & scored & (score >= low) & (score < high)).to(tl.int32),
        ),
        0,
        _add2,
    )
    own = first + tl.arange(0, SLICE)
    forced, scored, score = _kinds(scores_ptr, own, length, SINK, RECENT, PS)
    chosen = forced | (scored & (score >= high))
    if spare > 0:  # of equal scores the earlier pages
        ties = scored & (score >= low) & (score < high)
        chosen = chosen | (ties & (ties_before + tl.cumsum(ties.to(tl.int32), 0) <= spare))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    return chosen, chosen_before + tl.minimum(ties_before, spare) + place, count


@triton.jit
def zero_group(
    out_ptr,
    stride_head,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Zero the outputs [G, DV] of one KV head's group."""
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, DV_PAD)
    zeros = tl.zeros([G_PAD, DV_PAD], out_ptr.dtype.element_ty)
    inside = (head[:, None] < G) & (channel[None, :] < DV)
    tl.store(out_ptr + head[:, None] * stride_head + channel[None, :], zeros, inside)


@triton.jit
def _select_kernel(
    scores_ptr,
    page_ids_ptr,
    seq_lens_ptr,
    sparse_ptr,
    budget_ptr,
    q_ptr,
    candidate_page_ids_ptr,
    positions_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    kept_tokens_ptr,
    q_codes_ptr,
    q_scale_sum_ptr,
    chunk_counts_ptr,
    out_ptr,
    stride_scores,
    width,
    num_chunks,
    stride_page_ids,
    stride_q_row,
    stride_q_head,
    stride_out_row,
    stride_out_head,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_CODES: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    # With codes, one more program quantizes the group's queries while the others search.
    pairs = tl.num_programs(0) // (PARTS + (1 if HAS_CODES else 0))
    pair = tl.program_id(0) % pairs
    part = tl.program_id(0) // pairs
    row = pair // HK
    head_kv = pair % HK
    row64 = row.to(tl.int64)
    length = tl.load(seq_lens_ptr + row)
    is_sparse = tl.load(sparse_ptr + row) != 0
    if HAS_CODES and part == PARTS:
        if is_sparse & (length > 0):
            quantize_query(
                q_ptr + row64 * stride_q_row + head_kv * G * stride_q_head,
                q_codes_ptr + pair * G * 2 * D,
                q_scale_sum_ptr + pair * G * 2,
                stride_q_head,
                G,
                G_PAD,
                D,
                D_PAD,
            )
        return
    if (length <= 0) & (part == 0):
        out = out_ptr + row64 * stride_out_row + head_kv * G * stride_out_head
        zero_group(out, stride_out_head, G, G_PAD, DV, DV_PAD)
    pages = (length + PS - 1) // PS
    count = 0
    tokens = tl.maximum(length, 0)
    if is_sparse & (length > 0):
        SLICE: tl.constexpr = COLUMNS_PAD // PARTS
        position = part * SLICE + tl.arange(0, SLICE)
        page = tl.load(page_ids_ptr + row64 * stride_page_ids + position, position < pages, other=0)
        pair_scores_ptr = scores_ptr + pair.to(tl.int64) * stride_scores
        if PARTS == 1:
            chosen, count = choose_pages(
                pair_scores_ptr, length, budget_ptr, SINK, RECENT, PS, COLUMNS_PAD
            )
            place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        else:
            chosen, place, count = choose_slice(
                pair_scores_ptr,
                length,
                budget_ptr,
                part * SLICE,
                SINK,
                RECENT,
                PS,
                COLUMNS_PAD,
                SLICE,
            )
        tl.store(candidate_page_ids_ptr + pair.to(tl.int64) * width + place, page, chosen)
        if CENTRED:
            tl.store(positions_ptr + pair.to(tl.int64) * width + place, position, chosen)
        tokens = count * PS - (pages * PS - length)
    if part == 0:
        if HAS_CHUNKS:
            chunk = tl.arange(0, CHUNKS_PAD)
            tl.store(chunk_counts_ptr + pair * num_chunks + chunk, 0, chunk < num_chunks)
        tl.store(counts_ptr + pair, count)
        tl.store(candidate_tokens_ptr + pair, tokens)
        tl.store(kept_tokens_ptr + pair, tokens)


def _tiling(columns_pad: int, pairs: int) -> tuple[int, int]:
    """Programs that list a (request, KV head)'s candidates, and their warps."""
    if is_interpreted():
        return (2 if pairs <= 8 else 1), 4
    if columns_pad > 4096:
        return (8 if pairs <= 8 else 1), 16
    return 1, 8 if columns_pad > (1024 if pairs <= 64 else 2048) else 4


def select_pages(
    scores: torch.Tensor,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    budgets: torch.Tensor,
    q: torch.Tensor,
    candidate_page_ids: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    q_codes: torch.Tensor | None,
    q_scale_sum: torch.Tensor | None,
    chunk_counts: torch.Tensor | None,
    out: torch.Tensor,
    *,
    page_size: int,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    """Pick each KV head's best pages, as `reference.select_pages`, and prepare the row.

    A few programs per request and KV head, and one more for its queries. Scores nearer to each
    other than 2**-24 of their range may count as equal; of equal ones the earlier page goes first.
    The kernel also quantizes the group's queries for the INT4 estimate and zeroes the output of
    padded rows, which no later kernel looks at.

    Args:
        scores: [B, HK, T] float32 from `page_scores`.
        page_ids, seq_lens, sparse: see `DecodePlan`.
        budgets: [T + 1] int32 from `budget_table`.
        q: [B, HQ, D].
        candidate_page_ids: [B, HK, C] int32, written: the candidates' physical pages in the order
            of their tokens; the rest keeps what it held.
        positions: [B, HK, C] int32, written: the same candidates' logical pages; None where nothing
            reads them.
        counts: [B, HK] int32, written: candidate pages; 0 for rows that are not sparse.
        candidate_tokens: [B, HK] int32, written: tokens of them; all tokens of a row that is
            not sparse.
        kept_tokens: [B, HK] int32, written: the same; pruning then overwrites sparse rows'.
        q_codes: [B, HQ, 2, D] int8 and q_scale_sum: [B, HQ, 2] float32, written for sparse rows,
            see `quantize_query`; None for the `exact` estimator.
        chunk_counts: [B, HK, chunks] int32, zeroed for `unite_kept`; None without pruning.
        out: [B, HQ, DV], zeroed for rows of length 0.
    """
    batch, heads_kv, columns = scores.shape
    heads_q, dim = q.shape[1:]
    group = heads_q // heads_kv
    num_chunks = 1 if chunk_counts is None else chunk_counts.shape[-1]
    columns_pad = max(16, triton.next_power_of_2(columns))
    parts, warps = _tiling(columns_pad, batch * heads_kv)
    _select_kernel[(batch * heads_kv * (parts + (q_codes is not None)),)](
        scores,
        page_ids,
        seq_lens,
        sparse,
        budgets,
        q,
        candidate_page_ids,
        positions,
        counts,
        candidate_tokens,
        kept_tokens,
        q_codes,
        q_scale_sum,
        chunk_counts,
        out,
        scores.stride(1),
        candidate_page_ids.shape[-1],
        num_chunks,
        page_ids.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        SINK=sink_tokens,
        RECENT=max(recent_tokens, 1),
        PS=page_size,
        HK=heads_kv,
        G=group,
        G_PAD=triton.next_power_of_2(group),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        DV=out.shape[-1],
        DV_PAD=triton.next_power_of_2(out.shape[-1]),
        COLUMNS_PAD=columns_pad,
        PARTS=parts,
        HAS_CODES=q_codes is not None,
        CENTRED=positions is not None,
        HAS_CHUNKS=chunk_counts is not None,
        CHUNKS_PAD=triton.next_power_of_2(num_chunks),
        **launch_options(warps),
    )
