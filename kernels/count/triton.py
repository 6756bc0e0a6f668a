"""Counting a decode step in one launch."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import launch

_TILE_ELEMENTS = 4096  # query heads times rows or layers that a program adds up at a time
IDLE_CLOCK = (torch.iinfo(torch.int64).max, 0)  # no program has begun, none has ended


@triton.jit
def _count_layer(
    layer,
    candidate_tokens_ptr,
    kept_tokens_ptr,
    masses_ptr,
    lengths_ptr,
    sparse_ptr,
    tokens_ptr,
    kept_mass_ptr,
    batch,
    stride_counts,
    stride_masses,
    HK: tl.constexpr,
    G: tl.constexpr,
    HK_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a layer's sparse rows to its totals; how many rows there were."""
    head = tl.arange(0, HK_PAD)
    lane = tl.arange(0, G_PAD)
    context = tl.zeros([HK_PAD], tl.int64)
    candidates = tl.zeros([HK_PAD], tl.int64)
    kept = tl.zeros([HK_PAD], tl.int64)
    mass = tl.zeros([HK_PAD], tl.float64)
    rows = tl.zeros([BLOCK], tl.int64)
    for start in range(0, batch, BLOCK):
        row = start + tl.arange(0, BLOCK)
        counted = (row < batch) & (tl.load(sparse_ptr + row, row < batch, other=0) != 0)
        rows += counted.to(tl.int64)
        context += tl.sum(tl.load(lengths_ptr + row, counted, other=0).to(tl.int64), 0)
        inside = counted[:, None] & (head < HK)[None, :]
        offset = layer * stride_counts + row[:, None] * HK + head[None, :]
        found = tl.load(candidate_tokens_ptr + offset, inside, other=0)
        candidates += tl.sum(found.to(tl.int64), 0)
        found = tl.load(kept_tokens_ptr + offset, inside, other=0)
        kept += tl.sum(found.to(tl.int64), 0)
        inside_group = inside[:, :, None] & (lane < G)[None, None, :]  # [BLOCK, HK_PAD, G_PAD]
        offset = row[:, None, None] * (HK * G) + head[None, :, None] * G + lane[None, None, :]
        shares = tl.load(masses_ptr + layer * stride_masses + offset, inside_group, other=0.0)
        shares = tl.where(shares == shares, shares, 0.0)  # NaN must not stay in the totals
        mass += tl.sum(tl.sum(shares.to(tl.float64), 2), 0)
    exists = head < HK
    totals_ptr = tokens_ptr + (layer * HK + head) * 3
    tl.store(totals_ptr, tl.load(totals_ptr, exists) + context, exists)
    tl.store(totals_ptr + 1, tl.load(totals_ptr + 1, exists) + candidates, exists)
    tl.store(totals_ptr + 2, tl.load(totals_ptr + 2, exists) + kept, exists)
    mass_ptr = kept_mass_ptr + layer * HK + head
    tl.store(mass_ptr, tl.load(mass_ptr, exists) + mass / G, exists)
    return tl.sum(rows, 0)


@triton.jit
def _count_row(
    row,
    candidate_tokens_ptr,
    kept_tokens_ptr,
    masses_ptr,
    lengths_ptr,
    sparse_ptr,
    pages_reused_ptr,
    row_sums_ptr,
    layers,
    stride_counts,
    stride_masses,
    HK: tl.constexpr,
    G: tl.constexpr,
    HK_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sums of a row over layers and KV heads; 0 if it is not sparse."""
    head = tl.arange(0, HK_PAD)
    lane = tl.arange(0, G_PAD)
    sparse = tl.load(sparse_ptr + row) != 0
    context = tl.load(lengths_ptr + row, sparse, other=0).to(tl.int64) * layers * HK
    reused = tl.load(pages_reused_ptr + row, sparse, other=0)
    candidates = tl.zeros((), tl.int64)
    kept = tl.zeros((), tl.int64)
    mass = tl.zeros((), tl.float64)
    for start in range(0, tl.where(sparse, layers, 0), BLOCK):
        layer = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (layer < layers)[:, None] & (head < HK)[None, :]
        offset = layer[:, None] * stride_counts + row * HK + head[None, :]
        found = tl.load(candidate_tokens_ptr + offset, inside, other=0)
        candidates += tl.sum(tl.sum(found.to(tl.int64), 1), 0)
        found = tl.load(kept_tokens_ptr + offset, inside, other=0)
        kept += tl.sum(tl.sum(found.to(tl.int64), 1), 0)
        inside_group = inside[:, :, None] & (lane < G)[None, None, :]  # [BLOCK, HK_PAD, G_PAD]
        offset = row * (HK * G) + head[None, :, None] * G + lane[None, None, :]
        offset += layer[:, None, None] * stride_masses
        shares = tl.load(masses_ptr + offset, inside_group, other=0.0)
        shares = tl.where(shares == shares, shares, 0.0)
        mass += tl.sum(tl.sum(tl.sum(shares.to(tl.float64), 2), 1), 0)
    sums_ptr = row_sums_ptr + row * 5
    tl.store(sums_ptr, context.to(tl.float64))
    tl.store(sums_ptr + 1, candidates.to(tl.float64))
    tl.store(sums_ptr + 2, kept.to(tl.float64))
    tl.store(sums_ptr + 3, mass / G)
    tl.store(sums_ptr + 4, reused.to(tl.float64))


@triton.jit(do_not_specialize_on_alignment=["batch"])  # multiples of 16 have the same code
def _count_kernel(
    candidate_tokens_ptr,
    kept_tokens_ptr,
    masses_ptr,
    lengths_ptr,
    sparse_ptr,
    pages_reused_ptr,
    tokens_ptr,
    kept_mass_ptr,
    sparse_rows_ptr,
    row_sums_ptr,
    turn_ptr,
    clock_ptr,
    nanoseconds_ptr,
    layers,
    batch,
    stride_counts,
    stride_masses,
    stride_turn,
    HK: tl.constexpr,
    G: tl.constexpr,
    HK_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CLOCK_UNSET: tl.constexpr,
    HAS_CLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < layers:
        rows = _count_layer(
            program.to(tl.int64),
            candidate_tokens_ptr,
            kept_tokens_ptr,
            masses_ptr,
            lengths_ptr,
            sparse_ptr,
            tokens_ptr,
            kept_mass_ptr,
            batch,
            stride_counts,
            stride_masses,
            HK,
            G,
            HK_PAD,
            G_PAD,
            BLOCK,
        )
        if program == 0:
            tl.store(sparse_rows_ptr, tl.load(sparse_rows_ptr) + rows)
            if HAS_CLOCK:
                ended = tl.load(clock_ptr + 1)
                spent = tl.where(ended > 0, ended - tl.load(clock_ptr), 0)
                tl.store(nanoseconds_ptr, tl.load(nanoseconds_ptr) + spent)
                tl.store(clock_ptr, CLOCK_UNSET)
                tl.store(clock_ptr + 1, tl.zeros((), tl.int64))
    else:
        _count_row(
            (program - layers).to(tl.int64),
            candidate_tokens_ptr,
            kept_tokens_ptr,
            masses_ptr,
            lengths_ptr,
            sparse_ptr,
            pages_reused_ptr,
            row_sums_ptr + tl.load(turn_ptr) * stride_turn,
            layers,
            stride_counts,
            stride_masses,
            HK,
            G,
            HK_PAD,
            G_PAD,
            BLOCK,
        )


def count_step(
    candidate_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    masses: torch.Tensor,
    lengths: torch.Tensor,
    sparse: torch.Tensor,
    pages_reused: torch.Tensor,
    tokens: torch.Tensor,
    kept_mass: torch.Tensor,
    sparse_rows: torch.Tensor,
    row_sums: torch.Tensor,
    turn: torch.Tensor,
    clock: torch.Tensor | None = None,
    nanoseconds: torch.Tensor | None = None,
) -> None:
    """What `reference.count_step` does, in one launch that a CUDA graph can hold.

    A program owns each layer's totals and one each row's sums, so nothing depends on their order.

    Args:
        row_sums: [T, >= B, 5] float64, on the device or pinned on the host: what
            `reference.count_step` writes, at this step's turn.
        turn: [1] int32, below T.
        clock: [2] int64, when `seal_pages` first began and last ended since it was read, in
            nanoseconds; read and set back to `IDLE_CLOCK`. None counts no time.
        nanoseconds: [1] int64, increased by the time between the two.
        Others: see `reference.count_step`.
    """
    layers, _, heads_kv = kept_tokens.shape
    batch = lengths.shape[0]
    group = masses.shape[2] // heads_kv
    pads = triton.next_power_of_2(heads_kv), triton.next_power_of_2(group)
    block = max(1, min(_TILE_ELEMENTS // (pads[0] * pads[1]), 64))
    launch(_count_kernel, layers + batch)(
        candidate_tokens,
        kept_tokens,
        masses,
        lengths,
        sparse,
        pages_reused,
        tokens,
        kept_mass,
        sparse_rows,
        row_sums,
        turn,
        clock,
        nanoseconds,
        layers,
        batch,
        kept_tokens.stride(0),
        masses.stride(0),
        row_sums.stride(0),
        HK=heads_kv,
        G=group,
        HK_PAD=pads[0],
        G_PAD=pads[1],
        BLOCK=block,
        CLOCK_UNSET=IDLE_CLOCK[0],
        HAS_CLOCK=clock is not None,
        num_warps=4,
    )
