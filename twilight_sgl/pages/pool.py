"""Summaries of every page of the KV pool, by physical page."""

from collections.abc import Callable, Sequence

import torch

from twilight_sgl.kernels.seal.reference import page_bounds, page_codes

FIELDS = ("min_max", "codes", "scale_zero")


def bounds_dtype(bounds: str, key_dtype: torch.dtype) -> torch.dtype:
    """Dtype of page bounds.

    That of the KV cache for `keys`, float8_e4m3fn for `float8`, and for `auto` float8_e4m3fn
    unless there is a GPU without it (compute capability below 8.9).
    """
    if bounds == "auto":
        has_gpu = torch.cuda.is_available()
        bounds = "keys" if has_gpu and torch.cuda.get_device_capability() < (8, 9) else "float8"
    return torch.float8_e4m3fn if bounds == "float8" else key_dtype


def summary_bytes_per_token(
    heads_kv: int, dim: int, bounds_bytes: int, page_size: int, has_codes: bool = True
) -> float:
    """Bytes of summary for each token of one layer.

    Quest's minimum and maximum once a page, `bounds_bytes` a number, and, where INT4 keys are
    kept, codes for each token with a float16 scale and zero point.
    """
    codes = dim / 2 + 4 if has_codes else 0
    return heads_kv * (2 * dim * bounds_bytes / page_size + codes)


class SummaryPool:
    """Page summaries beside the KV pool, and which pages are sealed.

    A page that is not sealed has no summary: its rows hold whatever was there. Page 0 is the
    padding page of SGLang's pool and is never sealed.

    Attributes:
        layer_ids: the model's layers that have summaries, in order.
        centred: whether INT4 keys are less their page's middle, see `page_codes`.
        sealed: [P] int32, 1 where a page's summary is valid.
        min_max: [L, P, HK, 2, D] in the dtype of keys or float8_e4m3fn.
        codes: [L, P, HK, PS, D // 2] uint8, and
        scale_zero: [L, P, HK, PS, 2] float16; both None where no INT4 keys are kept.
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
        has_codes: bool = True,
        centred: bool = False,
    ) -> None:
        """Allocate for `num_pages` rows, the padding page included, with bounds in `dtype`."""
        self.layer_ids = tuple(layer_ids)
        self.page_size = page_size
        self.num_pages = num_pages
        self.centred = centred
        self._rows = {layer: row for row, layer in enumerate(self.layer_ids)}
        layers = len(self.layer_ids)
        self.sealed = torch.zeros(num_pages, dtype=torch.int32, device=device)
        self.min_max = torch.empty(
            (layers, num_pages, heads_kv, 2, dim), dtype=dtype, device=device
        )
        self.codes: torch.Tensor | None = None
        self.scale_zero: torch.Tensor | None = None
        if has_codes:
            tokens = (layers, num_pages, heads_kv, page_size)
            self.codes = torch.empty((*tokens, dim // 2), dtype=torch.uint8, device=device)
            self.scale_zero = torch.empty((*tokens, 2), dtype=torch.float16, device=device)

    def has_layer(self, layer_id: int) -> bool:
        """Whether a layer of the model has summaries."""
        return layer_id in self._rows

    def row_of(self, layer_id: int) -> int:
        """A layer's index in the tensors; KeyError for a layer without summaries."""
        return self._rows[layer_id]

    def of_layer(
        self, layer_id: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One layer's min_max, codes and scale_zero; KeyError for a layer without summaries."""
        row = self._rows[layer_id]
        if self.codes is None or self.scale_zero is None:
            return self.min_max[row], None, None
        return self.min_max[row], self.codes[row], self.scale_zero[row]

    def fields_of_layer(self, layer_id: int) -> dict[str, torch.Tensor]:
        """The tensors of `of_layer` that exist, by name."""
        tensors = zip(FIELDS, self.of_layer(layer_id), strict=True)
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def summarize(self, keys: torch.Tensor) -> dict[str, torch.Tensor]:
        """Summaries of pages, [M, PS, HK, D] keys, as this pool keeps them: [M, ...] by name."""
        min_max = page_bounds(keys, self.min_max.dtype)
        if self.codes is None:
            return {"min_max": min_max}
        codes, scale_zero = page_codes(keys, min_max if self.centred else None)
        return {"min_max": min_max, "codes": codes, "scale_zero": scale_zero}

    def seal(self, page_ids: torch.Tensor, keys_of: Callable[[int], torch.Tensor]) -> None:
        """Build the summaries of full pages from their keys, in every layer.

        Args:
            page_ids: [M] distinct physical pages.
            keys_of: one layer's keys by page, [P, PS, HK, D], for a layer id.
        """
        pages = page_ids.long()
        for layer_id in self.layer_ids:
            summaries = self.summarize(keys_of(layer_id)[pages])
            for name, tensor in self.fields_of_layer(layer_id).items():
                tensor[pages] = summaries[name]
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
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
