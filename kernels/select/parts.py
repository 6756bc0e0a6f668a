"""What chooses candidate pages: the best of each stratum, ranked without a sort or a search.

The pages of a request are dealt out to its strata one by one, so that the last page is in the last
stratum. A stratum's pages are ranked by counting, for each, those that beat it.
"""

import triton
import triton.language as tl

from twilight_sgl.kernels.page_score.parts import score_pages, split_query
from twilight_sgl.kernels.select.reference import LEAST_OF_STRATUM, STRATUM_PAGES

_STRATUM_PAGES = tl.constexpr(STRATUM_PAGES)
_LEAST_OF_STRATUM = tl.constexpr(LEAST_OF_STRATUM)


@triton.jit
def count_candidates(
    length, budget_ptr, SINK: tl.constexpr, RECENT: tl.constexpr, PS: tl.constexpr
):
    """A sparse row's pages, its candidate pages and its strata; `reference.num_strata` of them.

    Args:
        length: tokens of the row, at least 1, or a tensor of such.
        budget_ptr: `budget_table`.
    """
    SINK_BELOW: tl.constexpr = (SINK + PS - 1) // PS
    BOUND: tl.constexpr = SINK_BELOW + (RECENT + PS - 1) // PS + 1  # `reference.forced_bound`
    pages = (length + PS - 1) // PS
    num_sink = tl.minimum(SINK_BELOW, pages)
    recent_from = tl.maximum(length - RECENT, 0) // PS
    num_forced = num_sink + pages - tl.maximum(recent_from, num_sink)
    count = tl.maximum(tl.load(budget_ptr + pages), num_forced)
    strata = tl.minimum(
        (pages + _STRATUM_PAGES - 1) // _STRATUM_PAGES,
        tl.maximum(count - BOUND, 0) // _LEAST_OF_STRATUM,
    )
    return pages, count, tl.maximum(strata, 1)


@triton.jit
def begin_of_stratum(stratum, total, strata):
    """Where a stratum's part of `total` things begins; the last strata have one more."""
    return stratum * (total // strata) + tl.maximum(stratum - (strata - total % strata), 0)


@triton.jit
def _rank_keys(
    score,
    index,
    index_mask,
    position,
    length,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
):
    """What pages are ranked by: int32 in the order of their scores, no two of a stratum equal.

    The lowest bits of a score make way for its page's index in the stratum, so that one comparison
    tells which of two pages is better; those of a page that is always kept are above all.
    """
    SINK_BELOW: tl.constexpr = (SINK + PS - 1) // PS
    recent_from = tl.maximum(length - RECENT, 0) // PS
    forced = (position < SINK_BELOW) | (position >= recent_from)
    score = tl.where(score == score, score, -float("inf"))  # keys that are not finite
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(forced, 0x7FFFFFFF, ordered)
    return (ordered & ~index_mask) | (index_mask - index)


@triton.jit
def _list_candidates(
    keys_ptr,
    row_page_ids_ptr,
    pages_ptr,
    positions_ptr,
    first_page,
    stratum_pages,
    place,
    room,
    strata,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """List the best pages of S strata for one KV head, each in ascending order.

    Args:
        keys_ptr: [S, 1] pointers to the strata's `_rank_keys`, written by this program.
        pages_ptr, positions_ptr: the (request, KV head)'s candidates, physical and logical.
        first_page, stratum_pages: [S, 1] of each stratum; 0 pages where there is none.
        place, room: [S] where in the list it begins, and how many candidates it has.
        BLOCK, OTHERS: pages of each ranked at a time, and compared with those at a time.
    """
    nothing: tl.constexpr = -0x80000000
    largest = tl.max(stratum_pages)
    for start in range(0, largest, BLOCK):
        index = start + tl.arange(0, BLOCK)[None, :]
        exists = index < stratum_pages  # [S, BLOCK]
        mine = tl.load(keys_ptr + index, exists, other=nothing)
        beaten = tl.zeros([mine.shape[0], BLOCK, OTHERS], tl.int32)  # summed once, at the end
        for other_start in range(0, largest, OTHERS):
            other = other_start + tl.arange(0, OTHERS)[None, :]
            theirs = tl.load(keys_ptr + other, other < stratum_pages, other=nothing)
            beaten += (theirs[:, None, :] > mine[:, :, None]).to(tl.int32)
        chosen = exists & (tl.sum(beaten, 2) < room[:, None])
        listed = place[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        position = first_page + index * strata
        page = tl.load(row_page_ids_ptr + position, chosen, other=0)
        tl.store(pages_ptr + listed, page, chosen)
        tl.store(positions_ptr + listed, position, chosen)
        place += tl.sum(chosen.to(tl.int32), 1)


@triton.jit
def choose_in_strata(
    q_group_ptr,
    min_max_ptr,
    row_page_ids_ptr,
    keys_ptr,
    middles_ptr,
    pages_ptr,
    positions_ptr,
    head_kv,
    length,
    pages,
    count,
    strata,
    first_stratum,
    stride_q_head,
    CENTRED: tl.constexpr,
    SLACK: tl.constexpr,
    SCORE: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    SCORE_ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STRATA: tl.constexpr,
    SCORE_PAGES: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    RANK_PAGES: tl.constexpr,
    RANK_OTHERS: tl.constexpr,
):
    """Score the pages of STRATA strata from `first_stratum` on for a KV head, and list the best.

    Args:
        q_group_ptr: the group's [G, D], of a sparse row.
        keys_ptr: int32 scratch for the (request, KV head)'s pages, by stratum, see `_rank_keys`.
        middles_ptr, pages_ptr, positions_ptr: its own.
        pages, count, strata: from `count_candidates`.
    """
    stratum = first_stratum + tl.arange(0, STRATA)
    begin = begin_of_stratum(stratum, pages, strata)
    stratum_pages = begin_of_stratum(stratum + 1, pages, strata) - begin
    stratum_pages = tl.where(stratum < strata, stratum_pages, 0)[:, None]
    first_page = ((stratum + pages) % strata)[:, None]
    keys_ptr += begin[:, None]
    largest = tl.max(stratum_pages)
    index_mask = _STRATUM_PAGES - 1
    while index_mask + 1 < largest:
        index_mask = index_mask * 2 + 1
    of_maxima, of_minima = split_query(
        q_group_ptr, stride_q_head, SLACK, CENTRED, SCORE, G, SCORE_ROWS, D, D_PAD
    )
    EACH: tl.constexpr = SCORE_PAGES // STRATA
    for start in tl.range(0, largest, EACH, num_stages=SCORE_STAGES):
        index = start + tl.arange(0, EACH)[None, :]
        position = tl.reshape(first_page + index * strata, [SCORE_PAGES])
        exists = tl.reshape(index < stratum_pages, [SCORE_PAGES])
        page = tl.load(row_page_ids_ptr + position, exists, other=0)
        inside = exists & (position < pages - 1)  # the last page is open and has no bounds
        score = score_pages(
            of_maxima,
            of_minima,
            min_max_ptr,
            middles_ptr,
            page,
            position,
            inside,
            head_kv,
            SLACK,
            CENTRED,
            SCORE,
            HK,
            G,
            G_ROWS,
            SCORE_ROWS,
            D,
            D_PAD,
        )
        index = tl.reshape(tl.broadcast_to(index, [STRATA, EACH]), [SCORE_PAGES])
        key = _rank_keys(score, index, index_mask, position, length, SINK, RECENT, PS)
        tl.store(
            tl.reshape(keys_ptr + start + tl.arange(0, EACH)[None, :], [SCORE_PAGES]), key, exists
        )
    place = begin_of_stratum(stratum, count, strata)
    tl.debug_barrier()
    _list_candidates(
        keys_ptr,
        row_page_ids_ptr,
        pages_ptr,
        positions_ptr,
        first_page,
        stratum_pages,
        place,
        begin_of_stratum(stratum + 1, count, strata) - place,
        strata,
        RANK_PAGES,
        RANK_OTHERS,
    )
