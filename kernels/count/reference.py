"""Counting a decode step in plain PyTorch."""

import torch

TOKEN_COUNTS = ("context", "candidate", "kept")
ROW_SUMS = (*TOKEN_COUNTS, "mass", "pages_reused")


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
) -> None:
    """Add a step's sparse rows to running totals, and sum each row over layers and KV heads.

    The mass of a KV head is the mean over its group's query heads; one that is NaN, as logits that
    are not finite make it, counts as 0, so that it does not stay in the totals.

    Args:
        candidate_tokens, kept_tokens: [L, >= B, HK] int32, of which the first B rows count.
        masses: [L, >= B, HQ] float32, share of the candidates' weight that was kept.
        lengths: [B] int32 tokens of each row; sparse: [B] bool, the rows that count.
        pages_reused: [>= B] int32, pages that the row's request found sealed in this step.
        tokens: [L, HK, 3] int64, increased: `TOKEN_COUNTS`.
        kept_mass: [L, HK] float64, increased.
        sparse_rows: [1] int64, increased by the number of sparse rows.
        row_sums: [>= B, 5] float64, the first B rows written: `ROW_SUMS` of this step, 0 for rows
            that are not sparse. Sums of tokens are exact below 2 ** 53.
    """
    batch = lengths.shape[0]
    layers, _, heads_kv = kept_tokens.shape
    counted = sparse.view(1, -1, 1)
    context = lengths.view(1, -1, 1).expand(layers, batch, heads_kv)
    counts = torch.stack((context, candidate_tokens[:, :batch], kept_tokens[:, :batch]), -1)
    counts = counts.long() * counted.unsqueeze(-1)  # [L, B, HK, 3]
    shares = masses[:, :batch].double().nan_to_num(0.0)
    mass = shares.unflatten(2, (heads_kv, -1)).mean(-1)
    mass = torch.where(counted, mass, 0.0)  # [L, B, HK]
    tokens += counts.sum(1)
    kept_mass += mass.sum(1)
    sparse_rows += sparse.sum()
    row_sums[:batch, :3] = counts.sum((0, 2)).double()
    row_sums[:batch, 3] = mass.sum((0, 2))
    row_sums[:batch, 4] = torch.where(sparse, pages_reused[:batch], 0).double()
