"""What attention kernels are made of: attend to a span, normalise, merge partial results."""

import triton
import triton.language as tl

from twilight_sgl.kernels.launch import soft_cap_logits

LOG2E = 1.4426950408889634


@triton.jit
def attend_span(
    q_group_ptr,
    keys_head_ptr,
    values_head_ptr,
    list_ptr,
    start,
    end,
    by_token,
    stride_q_head,
    sm_scale,
    logit_cap,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    LOG2E: tl.constexpr,
    HAS_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    PS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of a group over the listed tokens from start to below end, not yet normalised.

    Args:
        list_ptr: token slots where by_token, else physical pages.
    Returns:
        [G_PAD] largest logit in units of log 2, [G_PAD] sum of weights relative to it, and
        [G_PAD, DV_PAD] weighted sum of values; float32.
    """
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, D_PAD)
    value_channel = tl.arange(0, DV_PAD)
    tile_token = tl.arange(0, TILE)
    shrink = tl.where(by_token, 1, PS)
    within = tl.where(by_token, 0, PS - 1)
    q = tl.load(
        q_group_ptr + head[:, None] * stride_q_head + channel[None, :],
        (head[:, None] < G) & (channel[None, :] < D),
        other=0.0,
    ).to(COMPUTE)
    most = tl.full([G_PAD], -float("inf"), tl.float32)
    sums = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, DV_PAD], tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        token = first + tile_token
        valid = token < end
        listed = tl.load(list_ptr + token // shrink, valid, other=0)
        # A slot fits 32 bits; times a constant stride it is one instruction to its address.
        slot = (listed * shrink + (token & within)).to(tl.int64)
        keys = tl.load(
            keys_head_ptr + slot[:, None] * KEY_STRIDE + channel[None, :],
            valid[:, None] & (channel[None, :] < D),
            other=0.0,
        )
        values = tl.load(
            values_head_ptr + slot[:, None] * VALUE_STRIDE + value_channel[None, :],
            valid[:, None] & (value_channel[None, :] < DV),
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(keys.to(COMPUTE)), input_precision="ieee") * sm_scale
        scores = soft_cap_logits(scores, logit_cap, HAS_CAP) * LOG2E
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new_most[:, None])
        decay = tl.exp2(most - new_most)
        sums = sums * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(COMPUTE), values.to(COMPUTE), acc, input_precision="ieee")
        most = new_most
    return most, sums, acc


@triton.jit
def _sink_logits(
    sinks_ptr, LOG2E: tl.constexpr, G: tl.constexpr, G_ROWS: tl.constexpr, HAS_SINKS: tl.constexpr
):
    """[G_ROWS] logits of a group's learned sinks in units of log 2; -inf where there is none."""
    sinks = tl.full([G_ROWS], -float("inf"), tl.float32)
    if HAS_SINKS:
        head = tl.arange(0, G_ROWS)
        sinks = tl.load(sinks_ptr + head, head < G, other=-float("inf")).to(tl.float32) * LOG2E
    return sinks


@triton.jit
def merge_partials(
    partial_ptr,
    partial_stats_ptr,
    sinks_ptr,
    out_ptr,
    first,
    splits,
    stride_out_head,
    LOG2E: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Combine a group's partial results of programs `first` to `first + splits - 1`, in order.

    Program n's partial results are number 2 * n of a list that an earlier program began, and
    number 2 * n + 1 of one that it began itself.
    """
    head = tl.arange(0, G_ROWS)
    channel = tl.arange(0, DV_PAD)
    top = _sink_logits(sinks_ptr, LOG2E, G, G_ROWS, HAS_SINKS)
    total = tl.where(top > -float("inf"), 1.0, 0.0)
    out = tl.zeros([G_ROWS, DV_PAD], tl.float32)
    for start in range(0, splits, SPLIT_BLOCK):
        split = start + tl.arange(0, SPLIT_BLOCK)
        number = (first + split) * 2 + (split == 0).to(tl.int32)
        there = (split < splits)[:, None] & (head < G)[None, :]  # [SPLIT_BLOCK, G_ROWS]
        stats_ptr = partial_stats_ptr + number[:, None] * (2 * G_ROWS) + head[None, :]
        most = tl.load(stats_ptr, there, other=-float("inf"), cache_modifier=".cg")
        sums = tl.load(stats_ptr + G_ROWS, there, other=0.0, cache_modifier=".cg")
        values_ptr = partial_ptr + number[:, None, None] * (G_ROWS * DV_PAD)
        values = tl.load(
            values_ptr + head[None, :, None] * DV_PAD + channel[None, None, :],
            there[:, :, None] & (channel[None, None, :] < DV),
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(most, 0))
        new_top = tl.where(head < G, new_top, 0.0)
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(most - new_top[None, :])
        total = total * decay + tl.sum(weight * sums, 0)
        out = out * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
        top = new_top
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    inside = (head[:, None] < G) & (channel[None, :] < DV)
    out_offset = head[:, None] * stride_out_head + channel[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def merge_together(
    partial_ptr,
    partial_stats_ptr,
    group_sinks_ptr,
    out_group_ptr,
    arrivals_ptr,
    first_program,
    split,
    splits,
    stride_out_head,
    LOG2E: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    MERGERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Wait for all splits of a (request, KV head), and merge the query heads dealt to this one.

    They are dealt to the last MERGERS splits: to the last alone where programs run one by one.
    Every split comes with its partial result, numbered as for `merge_partials`, before it waits.
    """
    while tl.atomic_add(arrivals_ptr, 0, sem="acquire") < splits:
        pass
    tl.debug_barrier()
    of_block = tl.arange(0, BLOCK)
    channel = tl.arange(0, DV_PAD)
    mergers = tl.minimum(splits, MERGERS)
    for member in range(splits - 1 - split, G, mergers):
        top = -float("inf")
        total = 0.0
        if HAS_SINKS:
            top = tl.load(group_sinks_ptr + member).to(tl.float32) * LOG2E
            total = 1.0
        result = tl.zeros([DV_PAD], tl.float32)
        for first in range(0, splits, BLOCK):
            one = first + of_block
            number = (first_program + one) * 2 + (one == 0).to(tl.int32)
            stats_ptr = partial_stats_ptr + number * (2 * G_ROWS) + member
            most = tl.load(stats_ptr, one < splits, other=-float("inf"), cache_modifier=".cg")
            sums = tl.load(stats_ptr + G_ROWS, one < splits, other=0.0, cache_modifier=".cg")
            values_ptr = partial_ptr + (number * G_ROWS + member)[:, None] * DV_PAD
            values = tl.load(
                values_ptr + channel[None, :],
                (one < splits)[:, None] & (channel[None, :] < DV),
                other=0.0,
                cache_modifier=".cg",
            )
            new_top = tl.maximum(top, tl.max(most, 0))
            decay = tl.exp2(top - new_top)
            weight = tl.exp2(most - new_top)
            total = total * decay + tl.sum(sums * weight, 0)
            result = result * decay + tl.sum(values * weight[:, None], 0)
            top = new_top
        out = (result / total).to(out_group_ptr.dtype.element_ty)
        tl.store(out_group_ptr + member * stride_out_head + channel, out, channel < DV)
    # Who leaves last has nobody behind it that still looks at the count.
    if tl.atomic_add(arrivals_ptr, 1, sem="relaxed") == splits + mergers - 1:
        tl.store(arrivals_ptr, 0)


@triton.jit
def store_group(
    out_ptr,
    sinks_ptr,
    most,
    sums,
    acc,
    stride_head,
    LOG2E: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Normalise what `attend_span` returned for all of a group's tokens, and store it."""
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, DV_PAD)
    if HAS_SINKS:
        sinks = _sink_logits(sinks_ptr, LOG2E, G, G_PAD, HAS_SINKS)
        top = tl.maximum(most, sinks)
        decay = tl.exp2(most - top)
        sums = sums * decay + tl.exp2(sinks - top)
        acc = acc * decay[:, None]
    result = acc / tl.where(sums > 0, sums, 1.0)[:, None]
    inside = (head[:, None] < G) & (channel[None, :] < DV)
    out_offset = head[:, None] * stride_head + channel[None, :]
    tl.store(out_ptr + out_offset, result.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def store_partial(
    partial_ptr,
    partial_stats_ptr,
    part,
    most,
    sums,
    acc,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Store what `attend_span` returned for some of a group's tokens as partial result `part`."""
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, DV_PAD)
    inside = (head[:, None] < G) & (channel[None, :] < DV)
    offset = head[:, None] * DV_PAD + channel[None, :]
    tl.store(partial_ptr + part * (G_ROWS * DV_PAD) + offset, acc, inside)
    stats_ptr = partial_stats_ptr + part * (2 * G_ROWS) + head
    tl.store(stats_ptr, most, head < G)
    tl.store(stats_ptr + G_ROWS, sums, head < G)


@triton.jit
def merge_head(
    partial_ptr,
    partial_stats_ptr,
    sinks_ptr,
    out_ptr,
    first,
    parts,
    member,
    LOG2E: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    G_ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    PARTS_PAD: tl.constexpr,
):
    """Combine the partial results from `first` on of one query head of a group."""
    part = tl.arange(0, PARTS_PAD)
    channel = tl.arange(0, DV_PAD)
    there = part < parts
    stats_ptr = partial_stats_ptr + (first + part) * (2 * G_ROWS) + member
    most = tl.load(stats_ptr, there, other=-float("inf"), cache_modifier=".cg")
    sums = tl.load(stats_ptr + G_ROWS, there, other=0.0, cache_modifier=".cg")
    values = tl.load(
        partial_ptr + ((first + part) * G_ROWS + member)[:, None] * DV_PAD + channel[None, :],
        there[:, None] & (channel[None, :] < DV),
        other=0.0,
        cache_modifier=".cg",
    )
    top = tl.max(most, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + member).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    weight = tl.exp2(most - top)
    total = tl.sum(sums * weight, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    result = tl.sum(values * weight[:, None], 0) / total
    tl.store(out_ptr + channel, result.to(out_ptr.dtype.element_ty), channel < DV)
