"""A decode step's rows in plain PyTorch."""

import torch


def plan_rows(
    req_to_token: torch.Tensor,
    request_slots: torch.Tensor,
    seq_lens: torch.Tensor,
    p_of_slot: torch.Tensor,
    *,
    page_size: int,
    min_context_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the rows of a decode step from SGLang's request table.

    Args:
        req_to_token: [S, N] int32 KV slot of every token of every request slot.
        request_slots: [B] integer rows of that table; 0 for a padded row.
        seq_lens: [B] integer tokens, the one being decoded included; ignored for padded rows.
        p_of_slot: [S] float32 mass to keep; above 1 for a request that stays dense.
        page_size: PS, tokens.
        min_context_tokens: rows with fewer tokens stay dense.
    Returns:
        page_ids: [B, T] int32 physical pages, 0 behind a row's last; T is the longest row's.
        lengths: [B] int32, 0 for padded rows.
        p: [B] float32, at most 1.
        sparse: [B] bool.
    """
    rows = request_slots.long()
    lengths = torch.where(rows > 0, seq_lens, 0).int()
    longest = int(lengths.max()) if lengths.numel() else 0
    page_ids = req_to_token[rows, :longest:page_size] // page_size
    num_pages = (lengths.unsqueeze(1) + page_size - 1) // page_size
    exists = torch.arange(page_ids.shape[1], device=page_ids.device) < num_pages
    p = p_of_slot[rows]
    sparse = (p <= 1) & (lengths >= max(min_context_tokens, 1))
    return page_ids.masked_fill(~exists, 0).int(), lengths, p.clamp(max=1), sparse
