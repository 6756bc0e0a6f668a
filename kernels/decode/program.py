"""The program of `decode_layer`: what each of a (request, KV head)'s programs does."""

import triton
import triton.language as tl

from twilight_sgl.kernels.attend.parts import attend_span, store_group, store_partial
from twilight_sgl.kernels.estimate.parts import estimate_pages, quantize_query
from twilight_sgl.kernels.launch import wait_for_inputs
from twilight_sgl.kernels.page_score.triton import score_pages, split_query
from twilight_sgl.kernels.select.parts import choose_pages
from twilight_sgl.kernels.select.triton import zero_group
from twilight_sgl.kernels.top_p.triton import find_thresholds, keep_any


@triton.jit
def _meet(arrivals_ptr, target, parts):
    """Wait until all programs of a (request, KV head) have come here, with what they wrote."""
    tl.debug_barrier()
    if parts > 1:
        seen = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") + 1
        while seen < target:
            seen = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
        tl.debug_barrier()


@triton.jit
def _merge_head(
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


@triton.jit(do_not_specialize=["parts"])
def decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    min_max_ptr,
    codes_ptr,
    scale_zero_ptr,
    page_ids_ptr,
    seq_lens_ptr,
    sparse_ptr,
    p_ptr,
    budget_ptr,
    scores_ptr,
    middles_ptr,
    candidate_page_ids_ptr,
    positions_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    kept_tokens_ptr,
    q_codes_ptr,
    q_scale_sum_ptr,
    logits_ptr,
    thresholds_ptr,
    masses_ptr,
    slots_ptr,
    partial_ptr,
    partial_stats_ptr,
    arrivals_ptr,
    sinks_ptr,
    out_ptr,
    parts,
    stride_scores,
    stride_middles,
    width,
    stride_page_ids,
    stride_q_row,
    stride_q_head,
    stride_key_head,
    stride_value_head,
    stride_out_row,
    stride_out_head,
    sm_scale,
    logit_cap,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    LOG2E: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EXACT: tl.constexpr,
    CENTRED: tl.constexpr,
    SLACK: tl.constexpr,
    SCORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STEPS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    SCORE_ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    SCORE_PAGES: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    ESTIMATE_TOKENS: tl.constexpr,
    ESTIMATE_STAGES: tl.constexpr,
    UNITE_TOKENS: tl.constexpr,
    ATTEND_TOKENS: tl.constexpr,
    ATTEND_STAGES: tl.constexpr,
    PACKED_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    pair = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    row = (pair // HK).to(tl.int64)
    head_kv = pair % HK
    pair64 = pair.to(tl.int64)
    length = tl.load(seq_lens_ptr + row)
    is_sparse = (tl.load(sparse_ptr + row) != 0) & (length > 0)
    q_group_ptr = q_ptr + row * stride_q_row + head_kv * G * stride_q_head
    keys_head_ptr = keys_ptr + head_kv * stride_key_head
    out_group_ptr = out_ptr + row * stride_out_row + head_kv * G * stride_out_head
    row_page_ids_ptr = page_ids_ptr + row * stride_page_ids
    arrivals_ptr += pair
    if not is_sparse:
        if part == 0:
            tl.store(counts_ptr + pair, 0)
            tl.store(candidate_tokens_ptr + pair, tl.maximum(length, 0))
            tl.store(kept_tokens_ptr + pair, tl.maximum(length, 0))
            if length <= 0:
                zero_group(out_group_ptr, stride_out_head, G, G_ROWS, DV, DV_PAD)
        per_part = (length + parts - 1) // parts
        start = part * per_part
        end = tl.minimum(start + per_part, length)
        list_ptr = row_page_ids_ptr
    else:
        head = tl.arange(0, G_PAD)
        pages_ptr = candidate_page_ids_ptr + pair64 * width
        pair_scores_ptr = scores_ptr + pair64 * stride_scores
        pair_logits_ptr = logits_ptr + pair64 * G * (width * PS)
        digits_ptr = q_codes_ptr
        scale_sum_ptr = q_scale_sum_ptr
        pair_middles_ptr = middles_ptr
        pair_positions_ptr = positions_ptr
        if not EXACT:
            digits_ptr += pair * G * 2 * D
            scale_sum_ptr += pair * G * 2
        if CENTRED:
            pair_middles_ptr += pair64 * stride_middles
            pair_positions_ptr += pair64 * width
        if part == 0:
            tl.store(kept_tokens_ptr + pair, 0)
            if not EXACT:
                quantize_query(
                    q_group_ptr,
                    digits_ptr,
                    scale_sum_ptr,
                    stride_q_head,
                    G,
                    G_ROWS,
                    D,
                    D_PAD,
                )

        of_maxima, of_minima = split_query(
            q_group_ptr, stride_q_head, SLACK, CENTRED, SCORE, G, SCORE_ROWS, D, D_PAD
        )
        full_pages = (length - 1) // PS
        step = parts * SCORE_PAGES
        for start in tl.range(part * SCORE_PAGES, full_pages, step, num_stages=SCORE_STAGES):
            column = start + tl.arange(0, SCORE_PAGES)
            inside = column < full_pages
            page = tl.load(row_page_ids_ptr + column, inside, other=0)
            score = score_pages(
                of_maxima,
                of_minima,
                min_max_ptr,
                pair_middles_ptr,
                page,
                column,
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
            tl.store(pair_scores_ptr + column, score, inside)
        _meet(arrivals_ptr, parts, parts)

        chosen, count = choose_pages(
            pair_scores_ptr, length, budget_ptr, SINK, RECENT, PS, COLUMNS_PAD
        )
        tokens = count * PS - ((length + PS - 1) // PS * PS - length)
        # Candidates are dealt out one by one, since those that are kept stand together.
        own_pages = (count - part + parts - 1) // parts
        position = tl.arange(0, COLUMNS_PAD)
        rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
        mine = chosen & (rank % parts == part)
        page_id = tl.load(row_page_ids_ptr + position, mine, other=0)
        tl.store(pages_ptr + rank, page_id, mine)
        if CENTRED:
            tl.store(pair_positions_ptr + rank, position, mine)
        if part == 0:
            tl.store(counts_ptr + pair, count)
            tl.store(candidate_tokens_ptr + pair, tokens)
        tl.debug_barrier()

        estimate_pages(
            q_group_ptr,
            keys_head_ptr,
            codes_ptr,
            scale_zero_ptr,
            digits_ptr,
            scale_sum_ptr,
            pair_middles_ptr,
            pair_positions_ptr,
            pages_ptr,
            pair_logits_ptr + head[:, None] * (width * PS),
            head_kv,
            part,
            count,
            parts,
            count,
            (length - 1) % PS + 1,
            stride_q_head,
            KEY_STRIDE,
            sm_scale,
            logit_cap,
            HAS_CAP,
            EXACT,
            CENTRED,
            COMPUTE,
            HK,
            G,
            G_ROWS,
            G_PAD,
            D,
            D_PAD,
            HALF_PAD,
            PS,
            ESTIMATE_TOKENS,
            ESTIMATE_STAGES,
            PACKED_ASM,
        )
        _meet(arrivals_ptr, 2 * parts, parts)

        mass = tl.load(p_ptr + row)
        for first in range(part * HEADS, G, parts * HEADS):
            member = first + tl.arange(0, HEADS)
            rows_ptr = pair_logits_ptr + tl.minimum(member, G - 1) * (width * PS)
            found, share = find_thresholds(rows_ptr, tokens, mass, STEPS, HEADS, CAPACITY)
            tl.store(thresholds_ptr + pair * G + member, found, member < G)
            tl.store(masses_ptr + pair * G + member, share, member < G)
        _meet(arrivals_ptr, 3 * parts, parts)

        pages_before = part * (count // parts) + tl.minimum(part, count % parts)
        list_ptr = slots_ptr + (pair64 * width + pages_before) * PS
        end = 0
        for block in range(0, own_pages * PS, UNITE_TOKENS):
            own = block + tl.arange(0, UNITE_TOKENS)
            token = (part + own // PS * parts) * PS + own % PS
            keep = keep_any(
                pair_logits_ptr,
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
            kept = keep.to(tl.int32)
            kept_page = tl.load(pages_ptr + token // PS, keep, other=0)
            tl.store(list_ptr + end + tl.cumsum(kept, 0) - 1, kept_page * PS + own % PS, keep)
            end += tl.sum(kept, 0)
        tl.atomic_add(kept_tokens_ptr + pair, end, sem="relaxed")
        start = 0
        tl.debug_barrier()

    if length > 0:
        most, sums, acc = attend_span(
            q_group_ptr,
            keys_head_ptr,
            values_ptr + head_kv * stride_value_head,
            list_ptr,
            start,
            end,
            is_sparse,
            stride_q_head,
            sm_scale,
            logit_cap,
            KEY_STRIDE,
            VALUE_STRIDE,
            LOG2E,
            HAS_CAP,
            COMPUTE,
            G,
            G_PAD,
            D,
            D_PAD,
            DV,
            DV_PAD,
            PS,
            ATTEND_TOKENS,
            ATTEND_STAGES,
        )
        if parts == 1:
            store_group(
                out_group_ptr,
                sinks_ptr + head_kv * G,
                most,
                sums,
                acc,
                stride_out_head,
                LOG2E,
                HAS_SINKS,
                G,
                G_PAD,
                DV,
                DV_PAD,
            )
        else:
            store_partial(
                partial_ptr,
                partial_stats_ptr,
                pair64 * parts + part,
                most,
                sums,
                acc,
                G,
                G_ROWS,
                G_PAD,
                DV,
                DV_PAD,
            )
            before = tl.where(is_sparse, 3 * parts, 0)
            _meet(arrivals_ptr, before + parts, parts)
            for member in range(part, G, parts):
                _merge_head(
                    partial_ptr,
                    partial_stats_ptr,
                    sinks_ptr + head_kv * G,
                    out_group_ptr + member * stride_out_head,
                    pair64 * parts,
                    parts,
                    member,
                    LOG2E,
                    HAS_SINKS,
                    G_ROWS,
                    DV,
                    DV_PAD,
                    PARTS_PAD,
                )
            # Who leaves last has nobody behind it that still looks at the count.
            if tl.atomic_add(arrivals_ptr, 1, sem="relaxed") == before + 2 * parts - 1:
                tl.store(arrivals_ptr, 0)
