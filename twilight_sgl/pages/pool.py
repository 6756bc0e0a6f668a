"""Summaries of every page of the KV pool, by physical page."""

from collections.abc import Callable, Sequence

import torch

from twilight_sgl.kernels.seal.reference import summarize


def summary_bytes_per_token(heads_kv: int, dim: int, key_bytes: int, page_size: int) -> float:
    """Bytes of summary for each token of one layer.

    Quest's minimum and maximum once a page in the key's type, and for each token INT4 codes with
    a float16 scale and zero point.
    """
    return heads_kv * (2 * dim * key_bytes / page_size + dim / 2 + 4)


class SummaryPool:
    """Page summaries beside the KV pool, and which pages are sealed.

    A page that is not sealed has no summary: its rows hold whatever was there. Page 0 is the
    padding page of SGLang's pool and is never sealed.

    Attributes:
        layer_ids: the model's layers that have summaries, in order.
        sealed: [P] int32, 1 where a page's summary is valid.
        min_max: [L, P, HK, 2, D] in the dtype of keys.
        codes: [L, P, HK, PS, D // 2] uint8.
        scale_zero: [L, P, HK, PS, 2] float16.
    """

    def __init__(
        self,
        *,
        layer_ids: Sequence[int],
        num_pages: int,
        page_size: int,
        heads_kv: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocate for `num_pages` rows, the padding page included."""
        self.layer_ids = tuple(layer_ids)
        self.page_size = page_size
        self.num_pages = num_pages
        self._rows = {layer: row for row, layer in enumerate(self.layer_ids)}
        layers = len(self.layer_ids)
        self.sealed = torch.zeros(num_pages, dtype=torch.int32, device=device)
        self.min_max = torch.empty(
            (layers, num_pages, heads_kv, 2, dim), dtype=dtype, device=device
        )
        self.codes = torch.empty(
            (layers, num_pages, heads_kv, page_size, dim // 2), dtype=torch.uint8, device=device
        )
        self.scale_zero = torch.empty(
            (layers, num_pages, heads_kv, page_size, 2), dtype=torch.float16, device=device
        )

    def has_layer(self, layer_id: int) -> bool:
        """Whether a layer of the model has summaries."""
        return layer_id in self._rows

    def row_of(self, layer_id: int) -> int:
        """A layer's index in the tensors; KeyError for a layer without summaries."""
        return self._rows[layer_id]

    def of_layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer's min_max, codes and scale_zero; KeyError for a layer without summaries."""
        row = self._rows[layer_id]
        return self.min_max[row], self.codes[row], self.scale_zero[row]

    def seal(self, page_ids: torch.Tensor, keys_of: Callable[[int], torch.Tensor]) -> None:
        """Build the summaries of full pages from their keys, in every layer.

        Args:
            page_ids: [M] distinct physical pages.
            keys_of: one layer's keys by page, [P, PS, HK, D], for a layer id.
        """
        pages = page_ids.long()
        for layer_id, row in self._rows.items():
            min_max, codes, scale_zero = summarize(keys_of(layer_id)[pages])
            self.min_max[row, pages] = min_max
            self.codes[row, pages] = codes
            self.scale_zero[row, pages] = scale_zero
        self.sealed[pages] = 1

    def unseal(self, page_ids: torch.Tensor) -> None:
        """Forget the summaries of pages: [M] physical pages, repeats allowed."""
        self.sealed.index_fill_(0, page_ids.long(), 0)

    def unseal_all(self) -> None:
        """Forget every summary."""
        self.sealed.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        tensors = (self.sealed, self.min_max, self.codes, self.scale_zero)
        return sum(tensor.nbytes for tensor in tensors)
