"""A decode step's KV slots and lengths in plain PyTorch."""

import torch


def next_slots(
    req_to_token: torch.Tensor,
    request_slots: torch.Tensor,
    seq_lens: torch.Tensor,
    orig_seq_lens: torch.Tensor,
    free_pages: torch.Tensor,
    *,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give every row's next token the slot behind its last one, or a new page's first.

    Rows whose tokens fill their pages take free pages in the order of rows, as SGLang's paged
    allocator has them do.

    Args:
        req_to_token: [S, N] int32 KV slot of every token of every request slot; the new token's is
            written.
        request_slots: [B] integer rows of that table, each once.
        seq_lens, orig_seq_lens: [B] integer tokens, the new one not included. SGLang counts twice,
            as chunks of a prompt differ in it.
        free_pages: [F] integer pages to take, from the first on; enough for all rows that want one.
        page_size: tokens.
    Returns:
        [B] int64 KV slots; [B] tokens with the new one, of both counts, in their dtypes.
    """
    rows, lengths = request_slots.long(), seq_lens.long()
    opens_page = lengths % page_size == 0
    last = req_to_token[rows, (lengths - 1).clamp(min=0)].long()
    pages = torch.zeros_like(lengths)
    pages[opens_page] = free_pages[: int(opens_page.sum())].long()
    slots = torch.where(opens_page, pages * page_size, last + 1)
    req_to_token[rows, lengths] = slots.int()
    return slots, seq_lens + 1, orig_seq_lens + 1
