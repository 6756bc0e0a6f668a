"""What one decode step attends to, before any layer has run."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The knobs of selection that are the same for every request.

    Attributes:
        page_size: PS, tokens a page.
        budget: B0; at most 1: a fraction of the context, above: tokens.
        sink_tokens: first tokens of a request that are always kept.
        recent_tokens: last tokens of a request that are always kept.
        estimator: `int4`, `int4_centred` (of keys less their page's middle) or `exact`.
        pruner: `top_p`, or `none` to attend to every candidate.
        selector: a name from `twilight_sgl.attention.selectors`.
        min_candidate_tokens: B0 that a fraction comes to at least.
    """

    page_size: int
    budget: float
    sink_tokens: int
    recent_tokens: int
    estimator: str = "int4"
    pruner: str = "top_p"
    selector: str = "quest"
    min_candidate_tokens: int = 0

    @property
    def centred(self) -> bool:
        """Whether INT4 keys are less their page's middle."""
        return self.estimator == "int4_centred"


@dataclass(frozen=True)
class DecodePlan:
    """The rows of one decode step; a snapshot that no scheduler thread writes to.

    Attributes (all on the device of the KV pool):
        page_ids: [B, T] int32, physical page of every logical page; 0 behind the last.
        seq_lens: [B] int32, tokens of each request, the one being decoded included; 0 for a
            padded row, which has no output, seals nothing and counts nowhere.
        p: [B] float32, the mass each request keeps.
        sparse: [B] bool, False for rows that attend to everything.
    """

    page_ids: torch.Tensor
    seq_lens: torch.Tensor
    p: torch.Tensor
    sparse: torch.Tensor

    def __post_init__(self) -> None:
        batch = self.seq_lens.shape[0]
        expected = {
            "page_ids": (torch.int32, (batch, self.page_ids.shape[-1])),
            "seq_lens": (torch.int32, (batch,)),
            "p": (torch.float32, (batch,)),
            "sparse": (torch.bool, (batch,)),
        }
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"DecodePlan.{name} must be {dtype} {shape}, "
                    f"is {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.device != self.seq_lens.device:
                raise ValueError(
                    f"DecodePlan.{name} is on {tensor.device}, seq_lens on {self.seq_lens.device}"
                )


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV cache and page summaries, by physical page.

    Attributes:
        keys: [P, PS, HK, D], values: [P, PS, HK, DV] views of SGLang's pool.
        min_max: [P, HK, 2, D]; codes: [P, HK, PS, D // 2] uint8;
        scale_zero: [P, HK, PS, 2] float16. See `twilight_sgl.kernels.seal`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    min_max: torch.Tensor
    codes: torch.Tensor | None
    scale_zero: torch.Tensor | None
