"""SGLang's paged allocator without Triton, for releases whose own needs it (0.5.17)."""

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """Allocates KV slots in plain PyTorch; freeing and bookkeeping stay SGLang's."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """Slots for requests that grow from prefix_lens to seq_lens tokens, all [B].

        A request first fills the page that last_loc, its last slot, lies in, then takes new ones.

        Returns:
            [extend_num_tokens] int64 slots, request by request, or None when pages run out.
        """
        owned_pages = (prefix_lens + self.page_size - 1) // self.page_size
        new_pages = (seq_lens + self.page_size - 1) // self.page_size - owned_pages
        taken = self._take(int(new_pages.sum()))
        if taken is None:
            return None
        added = seq_lens - prefix_lens
        row = torch.repeat_interleave(torch.arange(len(added), device=added.device), added)
        first_token = (added.cumsum(0) - added)[row]
        position = torch.arange(len(row), device=row.device) - first_token + prefix_lens[row]
        column = position // self.page_size - owned_pages[row]
        page = taken[((new_pages.cumsum(0) - new_pages)[row] + column).clamp(min=0)]
        in_new = page * self.page_size + position % self.page_size
        in_last = last_loc[row] + 1 + position - prefix_lens[row]
        return torch.where(column >= 0, in_new, in_last).long()

    def alloc_decode(
        self,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor | None:
        """One slot for each request's next token.

        Args:
            seq_lens: [B] tokens, the new one included.
            last_loc: [B] slot of the token before it.
        Returns:
            [B] int64 slots, or None when pages run out.
        """
        opens_page = (seq_lens - 1) % self.page_size == 0
        taken = self._take(int(opens_page.sum()))
        if taken is None:
            return None
        order = (opens_page.cumsum(0) - 1).clamp(min=0)
        return torch.where(opens_page, taken[order] * self.page_size, last_loc + 1).long()

    def _take(self, num_pages: int) -> torch.Tensor | None:
        """Remove pages from the free list: [num_pages] ids, padded by one so that it can be
        indexed when empty; None when there are too few."""
        if self.need_sort and num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_pages > len(self.free_pages):
            return None
        taken, self.free_pages = self.free_pages[:num_pages], self.free_pages[num_pages:]
        return torch.cat((taken, taken.new_zeros(1)))
