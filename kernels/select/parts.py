"""What chooses candidate pages: a search for the score of the last that fits, without a sort."""

import triton
import triton.language as tl

_LARGEST = tl.constexpr(1e38)


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
