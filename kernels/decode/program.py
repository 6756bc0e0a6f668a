"""The program of `decode_layer`: what each of a (request, KV head)'s programs does."""

import triton
import triton.language as tl

from twilight_sgl.kernels.attend.parts import attend_span, merge_head, store_group, store_partial
from twilight_sgl.kernels.estimate.parts import estimate_pages, quantize_query
from twilight_sgl.kernels.launch import wait_for_inputs
from twilight_sgl.kernels.row import write_token, zero_group
from twilight_sgl.kernels.select.parts import (
    begin_of_stratum,
    choose_in_strata,
    count_candidates,
)
from twilight_sgl.kernels.top_p.parts import find_thresholds, keep_any


@triton.jit
def _meet(arrivals_ptr, target, parts):
    """Wait until all programs of a (request, KV head) have come here, with what they wrote."""
    tl.debug_barrier()
    if parts > 1:
        seen = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") + 1
        while seen < target:
            seen = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
        tl.debug_barrier()


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
    rank_keys_ptr,
    middles_ptr,
    candidate_page_ids_ptr,
    positions_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    kept_tokens_ptr,
    logits_ptr,
    thresholds_ptr,
    masses_ptr,
    slots_ptr,
    partial_ptr,
    partial_stats_ptr,
    arrivals_ptr,
    sinks_ptr,
    out_ptr,
    new_keys_ptr,
    new_values_ptr,
    parts,
    stride_rank_keys,
    stride_middles,
    width,
    stride_page_ids,
    stride_q_row,
    stride_q_head,
    stride_key_head,
    stride_value_head,
    stride_out_row,
    stride_out_head,
    stride_new_key_row,
    stride_new_value_row,
    sm_scale,
    logit_cap,
    HAS_TOKEN: tl.constexpr,
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
    CAPACITY: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    STRATA: tl.constexpr,
    SCORE_PAGES: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    RANK_PAGES: tl.constexpr,
    RANK_OTHERS: tl.constexpr,
    ESTIMATE_TOKENS: tl.constexpr,
    ESTIMATE_STAGES: tl.constexpr,
    UNITE_TOKENS: tl.constexpr,
    ATTEND_TOKENS: tl.constexpr,
    ATTEND_STAGES: tl.constexpr,
    ASM: tl.constexpr,
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
    values_head_ptr = values_ptr + head_kv * stride_value_head
    # The program that a row's newest token falls to writes and reads it, so nobody waits for it.
    new_key_ptr = new_keys_ptr + row * stride_new_key_row + head_kv * D
    new_value_ptr = new_values_ptr + row * stride_new_value_row + head_kv * DV
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
        if HAS_TOKEN and (start < length) & (end == length):
            write_token(
                new_key_ptr,
                new_value_ptr,
                keys_head_ptr,
                values_head_ptr,
                row_page_ids_ptr,
                length,
                KEY_STRIDE,
                VALUE_STRIDE,
                PS,
                D,
                D_PAD,
                DV,
                DV_PAD,
            )
        tl.debug_barrier()
    else:
        pages_ptr = candidate_page_ids_ptr + pair64 * width
        pair_positions_ptr = positions_ptr + pair64 * width
        pair_logits_ptr = logits_ptr + pair64 * G * (width * PS)
        pages, count, strata = count_candidates(length, budget_ptr, SINK, RECENT, PS)
        tokens = count * PS - (pages * PS - length)
        if part == 0:
            tl.store(kept_tokens_ptr + pair, 0)
            tl.store(counts_ptr + pair, count)
            tl.store(candidate_tokens_ptr + pair, tokens)
        turns = (strata + STRATA - 1) // STRATA
        first_stratum = part * turns // parts * STRATA
        last_stratum = tl.minimum((part + 1) * turns // parts * STRATA, strata)
        for stratum in range(first_stratum, last_stratum, STRATA):
            choose_in_strata(
                q_group_ptr,
                min_max_ptr,
                row_page_ids_ptr,
                rank_keys_ptr + pair64 * stride_rank_keys,
                middles_ptr + pair64 * stride_middles,
                pages_ptr,
                pair_positions_ptr,
                head_kv,
                length,
                pages,
                count,
                strata,
                stratum,
                stride_q_head,
                CENTRED,
                SLACK,
                SCORE,
                SINK,
                RECENT,
                PS,
                HK,
                G,
                G_ROWS,
                SCORE_ROWS,
                D,
                D_PAD,
                STRATA,
                SCORE_PAGES,
                SCORE_STAGES,
                RANK_PAGES,
                RANK_OTHERS,
            )
        if HAS_TOKEN and part == parts - 1:
            write_token(
                new_key_ptr,
                new_value_ptr,
                keys_head_ptr,
                values_head_ptr,
                row_page_ids_ptr,
                length,
                KEY_STRIDE,
                VALUE_STRIDE,
                PS,
                D,
                D_PAD,
                DV,
                DV_PAD,
            )
        tl.debug_barrier()
        first_page = begin_of_stratum(first_stratum, count, strata)
        last_page = begin_of_stratum(last_stratum, count, strata)
        head = tl.arange(0, G_PAD)
        digits = 0
        if not EXACT:
            digits = quantize_query(q_group_ptr, stride_q_head, G, G_PAD, D // 2, HALF_PAD)
        estimate_pages(
            q_group_ptr,
            keys_head_ptr,
            codes_ptr,
            scale_zero_ptr,
            digits,
            middles_ptr + pair64 * stride_middles,
            pair_positions_ptr,
            pages_ptr,
            pair_logits_ptr + head[:, None] * (width * PS),
            head_kv,
            first_page,
            last_page,
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
            ASM,
        )
        _meet(arrivals_ptr, parts, parts)

        mass = tl.load(p_ptr + row)
        for first in range(part * HEADS, G, parts * HEADS):
            member = first + tl.arange(0, HEADS)
            rows_ptr = pair_logits_ptr + tl.minimum(member, G - 1) * (width * PS)
            found, share = find_thresholds(rows_ptr, tokens, mass, STEPS, HEADS, CAPACITY, ASM)
            tl.store(thresholds_ptr + pair * G + member, found, member < G)
            tl.store(masses_ptr + pair * G + member, share, member < G)
        _meet(arrivals_ptr, 2 * parts, parts)

        first_token = first_page * PS
        last_token = tl.minimum(last_page * PS, tokens)
        list_ptr = slots_ptr + pair64 * (width * PS) + first_token
        end = 0
        for block in range(first_token, last_token, UNITE_TOKENS):
            keep, token_slot = keep_any(
                pair_logits_ptr,
                thresholds_ptr + pair * G,
                pages_ptr,
                pair_positions_ptr,
                block,
                last_token,
                length,
                width * PS,
                G,
                PS,
                SINK,
                RECENT,
                UNITE_TOKENS,
            )
            kept = keep.to(tl.int32)
            tl.store(list_ptr + end + tl.cumsum(kept, 0) - 1, token_slot, keep)
            end += tl.sum(kept, 0)
        tl.atomic_add(kept_tokens_ptr + pair, end, sem="relaxed")
        start = 0
        tl.debug_barrier()

    if length > 0:
        most, sums, acc = attend_span(
            q_group_ptr,
            keys_head_ptr,
            values_head_ptr,
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
            before = tl.where(is_sparse, 2 * parts, 0)
            _meet(arrivals_ptr, before + parts, parts)
            for member in range(part, G, parts):
                merge_head(
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
