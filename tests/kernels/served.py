"""A GPU runtime over a small random KV cache, stepped as a model would."""

from types import SimpleNamespace
from typing import Any

import torch
from cases import DEVICE

from twilight_sgl.attention.triton_runtime import TritonRuntime
from twilight_sgl.config import TwilightConfig
from twilight_sgl.request import RequestOptions

PS = 16
LAYERS = (1, 2, 4)
DENSE_LAYER = 3
HEADS_Q, HEADS_KV, DIM = 6, 2, 64
COLUMNS = 12  # pages of the longest request
# Physical pages of the requests in slots 1 to 3; 1 and 2 share their first two pages.
PAGES = {1: range(1, 8), 2: [1, 2, *range(8, 18)], 3: range(18, 22)}
NUM_PAGES = 23
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Served:
    """A runtime with the requests of `PAGES` admitted; slot 3 is dense.

    Attributes:
        reads: for each step since the last `recount`, the rows' slots and lengths with copies of
            what the layers counted: candidate and kept tokens [L, B, HK], masses [L, B, HQ].
    """

    def __init__(self, **settings: Any) -> None:
        rng = torch.Generator().manual_seed(0)
        shape = (max(LAYERS) + 1, NUM_PAGES * PS, HEADS_KV, DIM)
        keys, values = (torch.randn(shape, generator=rng).to(DEVICE, DTYPE) for _ in range(2))
        pool = SimpleNamespace(get_key_buffer=keys.__getitem__, get_value_buffer=values.__getitem__)
        given = {"min_context_tokens": 0, "min_candidate_tokens": 0, "recent_tokens": 16}
        given |= {"bounds": "keys", "p": 0.8}
        self.runtime = TritonRuntime(
            TwilightConfig(**(given | settings)),
            pool,
            LAYERS,
            5,
            max_context=COLUMNS * PS,
            heads_q=HEADS_Q,
            dim_v=DIM,
            q_dtype=DTYPE,
            dense_layer_ids=[DENSE_LAYER],
        )
        self.runtime.reserve(8)
        self.table = torch.zeros((5, COLUMNS * PS), dtype=torch.int32)
        for slot, pages in PAGES.items():
            slots = torch.tensor(list(pages)).view(-1, 1) * PS + torch.arange(PS)
            self.table[slot, : slots.numel()] = slots.flatten().int()
        self.table = self.table.to(DEVICE)
        self.q = torch.randn((8, HEADS_Q, DIM), generator=rng).to(DEVICE, DTYPE)
        self.admit(
            {1: RequestOptions(), 2: RequestOptions(p=0.5), 3: RequestOptions(enabled=False)}
        )
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # steps may run on another stream

    def admit(self, options: dict[int, RequestOptions]) -> None:
        """Give slots to new requests."""
        self.runtime.on_requests_admitted(list(options), options.values())
        self.runtime.ledger.apply()

    def plan(self, slots: list[int], lengths: list[int]) -> None:
        """What the host does before a step, outside its graph."""
        rows = torch.tensor(slots, device=DEVICE), torch.tensor(lengths, device=DEVICE)
        self.runtime.begin_decode(self.table, *rows)

    def decode(self, batch: int) -> None:
        """What a step's graph holds."""
        self.runtime.seal_claimed()
        for layer in LAYERS:
            self.runtime.run_layer(layer, self.q[:batch], sm_scale=0.125, logit_cap=0.0, sinks=None)

    def step(self, slots: list[int], lengths: list[int]) -> torch.Tensor | None:
        """A whole step: its row sums on the host."""
        self.runtime.begin_step(dense=False)
        self.plan(slots, lengths)
        self.decode(len(slots))
        sums = self.runtime.take_row_sums()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return None if sums is None else torch.tensor(sums)

    def counted(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the last step's layers wrote: candidate and kept [L, B, HK], masses [L, B, HK]."""
        buffers = self.runtime._buffers_for(batch, selects=True)
        tensors = (buffers.candidate_tokens, buffers.kept_tokens, buffers.masses)
        candidates, kept, masses = (tensor[:, :batch].cpu() for tensor in tensors)
        return candidates, kept, masses.unflatten(2, (HEADS_KV, -1)).double().mean(-1)
