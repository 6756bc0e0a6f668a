"""The seal invariant under every order of events that a server can produce.

A small server is built from the real pieces: SGLang's paged allocator with the hooks of
`patches.page_release`, the forward hook of `patches.forward_order`, the admission hook of
`patches.request_slots` and a `TwilightRuntime`. Only the KV pool and the radix tree are stand-ins.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

from twilight_sgl.attention import runtime as runtime_module
from twilight_sgl.attention.runtime import TwilightRuntime
from twilight_sgl.config import TwilightConfig
from twilight_sgl.pages.audit import audit
from twilight_sgl.pages.sealing import pages_needed
from twilight_sgl.patches import forward_order, page_release, request_slots
from twilight_sgl.platforms.cpu import TorchCpuPlatform

PS = 16
NUM_PAGES = 24
MAX_TOKENS = 12 * PS
REQUEST_SLOTS = 6  # slot 0 is padding
LAYERS = (1, 3)
HEADS_KV, DIM = 1, 4
DEFAULT_P = 0.9

picks = st.integers(0, 11)
tokens = st.integers(1, 4 * PS) | st.sampled_from([PS - 1, PS, PS + 1, 2 * PS])
options = st.sampled_from([{}, {"p": 0.5}, {"p": 1.0}, {"enabled": False}])
routes = st.sampled_from(["free", "group", "segment"])


def hooked_allocator() -> type:
    """SGLang's allocator as the CPU platform picks it, with the page-release hooks applied."""
    base = TorchCpuPlatform().get_paged_allocator_cls() or PagedTokenToKVPoolAllocator
    hooked = {}
    for patch in page_release.PATCHES:
        name = patch.target.rpartition(".")[2]
        hooked[name] = _wrap_fn(getattr(base, name), patch.hook, HookType(patch.when))
    return type("HookedAllocator", (base,), hooked)


@dataclass
class Request:
    """A request that holds a slot.

    Attributes:
        length: tokens whose keys were written and count.
        target: tokens of its prompt; shorter means that prefill is not done.
        first: whether no sparse step has seen it yet.
    """

    slot: int
    length: int
    target: int
    options: dict[str, Any]
    first: bool = True

    @property
    def p(self) -> float:
        if self.options.get("enabled") is False:
            return float("inf")
        return self.options.get("p", DEFAULT_P)


class Server(RuleBasedStateMachine):
    break_it: ClassVar[Callable[[TwilightRuntime], None]] = staticmethod(lambda runtime: None)
    only_audit: ClassVar[bool] = False

    @initialize(min_context=st.sampled_from([0, 40]), audit_interval=st.sampled_from([0, 2]))
    def start(self, min_context: int, audit_interval: int) -> None:
        self.rng = torch.Generator().manual_seed(0)
        size = (NUM_PAGES + 1) * PS
        self.keys = torch.full((max(LAYERS) + 1, size, HEADS_KV, DIM), float("nan"))
        pool = SimpleNamespace(get_key_buffer=lambda layer: self.keys[layer])
        config = TwilightConfig(
            p=DEFAULT_P,
            page_size=PS,
            min_context_tokens=min_context,
            audit_interval=audit_interval,
        )
        self.min_context = max(min_context, 1)
        self.runtime = TwilightRuntime(config, pool, LAYERS, REQUEST_SLOTS)
        self.break_it(self.runtime)
        self.runner = SimpleNamespace(twilight=self.runtime)
        self.slot_table = SimpleNamespace(twilight=self.runtime)
        self.allocator = hooked_allocator()(
            NUM_PAGES * PS, PS, torch.float32, "cpu", pool, need_sort=False
        )
        self.allocator.twilight = self.runtime
        self.table = torch.zeros((REQUEST_SLOTS, MAX_TOKENS), dtype=torch.int32)
        self.free_slots = list(range(1, REQUEST_SLOTS))
        self.requests: list[Request] = []
        self.retracted: list[tuple[int, dict[str, Any]]] = []
        self.cached: list[list[int]] = []
        self.holders: Counter[int] = Counter()
        self.pending: set[int] = set()
        self.totals = (0, 0, 0)
        self.built_at_flush = 0

    # What the server is made of.

    @property
    def sealed(self) -> set[int]:
        return set(self.runtime.pool.sealed.nonzero().squeeze(1).tolist())

    @property
    def ready(self) -> list[Request]:
        return [r for r in self.requests if r.length >= r.target]

    @property
    def unready(self) -> list[Request]:
        return [r for r in self.requests if r.length < r.target]

    def pages(self, request: Request, length: int | None = None) -> list[int]:
        """Physical pages that hold a request's first `length` tokens."""
        row = self.table[request.slot, : request.length if length is None else length : PS]
        return (row // PS).tolist()

    def token_slots(self, pages: list[int]) -> torch.Tensor:
        return (torch.tensor(pages).view(-1, 1) * PS + torch.arange(PS)).flatten()

    def admit_slot(self, slot: int, wanted: dict[str, Any]) -> None:
        params = SimpleNamespace(custom_params={"twilight": wanted} if wanted else None)
        req = SimpleNamespace(sampling_params=params)
        request_slots.PATCHES[0].hook([slot], self.slot_table, [req])

    def forward(self, mode: ForwardMode, token_slots: torch.Tensor | None) -> None:
        """Everything that comes before a forward's first kernel."""
        batch = SimpleNamespace(forward_mode=mode, out_cache_loc=token_slots)
        forward_order.PATCHES[0].hook(self.runner, batch)
        if mode.is_extend_without_speculative() and token_slots is not None:
            self.pending.update((token_slots // PS).tolist())
        else:
            self.pending.clear()
        self.check_audit()
        sealed = self.sealed - self.pending
        assert self.only_audit or not {page for page in sealed if not self.holders[page]}

    def write(self, token_slots: torch.Tensor) -> None:
        for layer in LAYERS:
            shape = (len(token_slots), HEADS_KV, DIM)
            self.keys[layer, token_slots] = torch.randn(shape, generator=self.rng)

    def take(self, pages: list[int]) -> None:
        """The allocator gave these pages to somebody."""
        assert not any(page == 0 or self.holders[page] for page in pages)
        self.holders.update(pages)

    def drop(self, pages: list[int], token_slots: torch.Tensor, route: str) -> None:
        """One holder of a chain lets go; the slots of pages that nobody holds are freed.

        Later pages of a chain never have more holders than earlier ones.
        """
        self.holders.subtract(pages)
        first = next((i for i, page in enumerate(pages) if not self.holders[page]), len(pages))
        assert not any(self.holders[page] for page in pages[first:])
        self.pending.update(pages[first:])
        freed = token_slots[first * PS :].long()
        if route == "segment":
            self.allocator.free_segment(freed, start_pos=first * PS)
        elif route == "group" and len(freed):
            self.allocator.free_group_begin()
            half = len(freed) // PS // 2 * PS
            self.allocator.free(freed[:half])
            self.allocator.free(freed[half:])
            self.allocator.free_group_end()
        else:
            self.allocator.free(freed)

    def grow(self, requests: list[Request], added: int) -> torch.Tensor | None:
        """Give slots for `added` tokens to each; cached chains are evicted when pages run out."""
        if not requests or max(r.length for r in requests) + added > MAX_TOKENS:
            return None
        before = torch.tensor([r.length for r in requests])
        after = before + added
        rows = torch.tensor([r.slot for r in requests])
        last = self.table[rows, (before - 1).clamp(min=0)].long()
        while True:
            if added == 1 and before.all():
                slots = self.allocator.alloc_decode(after, after, last)
            else:
                total = added * len(requests)
                slots = self.allocator.alloc_extend(before, before, after, after, last, total)
            if slots is not None:
                break
            if not self.cached:
                return None
            self.evict(0, "free")
        for request, mine in zip(requests, slots.view(len(requests), added), strict=True):
            end = request.length + added
            self.table[request.slot, request.length : end] = mine.int()
            self.take(self.pages(request, end)[-(-request.length // PS) :])
        return slots

    def shorten(self, request: Request, held: int, length: int, route: str = "free") -> None:
        """Give back the pages of a request's `held` tokens that lie behind the first `length`."""
        request.length = length
        keep = -(-length // PS)
        pages = self.pages(request, held)[keep:]
        self.drop(pages, self.table[request.slot, keep * PS : held], route)

    def release(self, request: Request, *, held: int, keep: bool, route: str) -> None:
        """A request ends with slots for `held` tokens; its full pages may stay cached."""
        pages = self.pages(request, held)
        full = pages[: request.length // PS]
        if keep and full:
            self.cached.append(full)
            self.holders.update(full)
        self.drop(pages, self.table[request.slot, :held], route)
        self.requests.remove(request)
        self.free_slots.append(request.slot)

    def admit(self, added: int, wanted: dict[str, Any], share: int, from_host: int) -> bool:
        """Give a slot to a request whose prompt begins with another's full pages.

        Of the pages that follow, `from_host` are loaded back from host memory: no forward writes
        them.
        """
        chains = [*self.cached, *(self.pages(r)[: r.length // PS] for r in self.requests), []]
        chain = chains[share % len(chains)]
        chain = chain[: 1 + share % max(len(chain), 1)]
        prefix = len(chain) * PS
        if prefix + from_host * PS + added > MAX_TOKENS:
            return False
        loaded = self.allocator.alloc(from_host * PS) if from_host else None
        slot = self.free_slots.pop(0)
        self.admit_slot(slot, wanted)
        self.table[slot, :prefix] = self.token_slots(chain).int()
        self.holders.update(chain)
        if loaded is not None:
            self.table[slot, prefix : prefix + len(loaded)] = loaded.int()
            prefix += len(loaded)
            self.take((loaded[::PS] // PS).tolist())
            self.write(loaded)
        self.requests.append(Request(slot, prefix, prefix + added, wanted))
        return True

    # What can happen to it.

    @rule(
        added=tokens,
        wanted=options,
        share=picks,
        from_host=st.sampled_from([0, 0, 1, 3]),
        at_once=st.booleans(),
    )
    def new_request(
        self, added: int, wanted: dict[str, Any], share: int, from_host: int, at_once: bool
    ) -> None:
        """With every slot taken, the oldest request ends first."""
        if not self.free_slots:
            oldest = self.requests[0]
            self.release(oldest, held=oldest.length, keep=at_once, route="free")
        if self.admit(added, wanted, share, from_host) and at_once:
            self.prefill_chunk(self.requests[-1], added, [])

    @precondition(lambda self: self.free_slots and self.retracted)
    @rule(share=picks)
    def readmit(self, share: int) -> None:
        length, wanted = self.retracted.pop(0)
        self.admit(length, wanted, share, 0)

    @precondition(lambda self: self.unready)
    @rule(pick=picks, chunk=tokens, mixed=st.booleans())
    def prefill(self, pick: int, chunk: int, mixed: bool) -> None:
        """A chunk of one prompt, maybe with a decode token of every other request."""
        request = self.unready[pick % len(self.unready)]
        self.prefill_chunk(request, chunk, self.ready if mixed else [])

    def prefill_chunk(self, request: Request, chunk: int, others: list[Request]) -> None:
        chunk = min(chunk, request.target - request.length)
        slots = self.grow([request], chunk)
        if slots is None:
            return
        request.length += chunk
        decoded = self.grow(others, 1)
        if decoded is not None:
            slots = torch.cat((slots, decoded))
            for other in others:
                other.length += 1
        self.forward(ForwardMode.EXTEND if decoded is None else ForwardMode.MIXED, slots)
        self.write(slots)

    @precondition(lambda self: self.ready)
    @rule(steps=st.sampled_from([1, 2, PS - 1, PS, PS + 1, 2 * PS]))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.decode_step(self.ready)

    @precondition(lambda self: self.ready)
    @rule(
        overshoots=st.sampled_from(["sealing", "writing", "done"]),
        pick=picks,
        keep=st.booleans(),
        route=routes,
    )
    def decode_past_the_end(self, overshoots: str, pick: int, keep: bool, route: str) -> None:
        """One row of a step turns out to have ended while the step is under way."""
        self.decode_step(self.ready, 2, overshoots, pick, keep, route)

    def decode_step(
        self,
        batch: list[Request],
        padding: int = 0,
        overshoots: str | None = None,
        pick: int = 0,
        keep: bool = False,
        route: str = "free",
    ) -> None:
        slots = self.grow(batch, 1)
        if slots is None:
            return
        ended = batch[pick % len(batch)]

        def end_if(when: str) -> None:
            if overshoots == when:
                self.release(ended, held=ended.length + 1, keep=keep, route=route)

        rows = torch.tensor([r.slot for r in batch] + [0] * padding)
        lengths = torch.tensor([r.length + 1 for r in batch] + [1] * padding)
        self.forward(ForwardMode.DECODE, slots)
        expected = self.expected_step(batch)
        end_if("sealing")
        plan = self.runtime.begin_decode(self.table, rows, lengths)
        self.check_step(plan, batch, expected)
        end_if("writing")
        self.write(slots)
        end_if("done")
        for request in batch:
            request.length += request in self.requests

    @precondition(lambda self: self.ready)
    @rule(drafted=st.integers(1, PS + 2), accepted=st.integers(0, PS + 2))
    def verify_drafts(self, drafted: int, accepted: int) -> None:
        batch = self.ready
        slots = self.grow(batch, drafted)
        if slots is None:
            return
        self.forward(ForwardMode.TARGET_VERIFY, slots)
        self.write(slots)
        for request in batch:
            held = request.length + drafted
            self.shorten(request, held, request.length + min(accepted, drafted))

    @precondition(lambda self: self.ready)
    @rule(pick=picks, back=st.integers(1, 3 * PS), again=st.integers(1, 3 * PS), route=routes)
    def next_turn_overwrites_tail(self, pick: int, back: int, again: int, route: str) -> None:
        """A streaming session writes over the end of its last turn, in place."""
        request = self.ready[pick % len(self.ready)]
        shared = sum(self.holders[page] > 1 for page in self.pages(request)) * PS
        start = max(request.length - back, shared)
        if start >= request.length:
            return
        end = min(start + again, request.length)
        self.shorten(request, request.length, end, route)
        slots = self.table[request.slot, start:end].long()
        self.forward(ForwardMode.EXTEND, slots)
        self.write(slots)

    @precondition(lambda self: self.requests)
    @rule(pick=picks, keep=st.booleans(), route=routes, retract=st.booleans())
    def end(self, pick: int, keep: bool, route: str, retract: bool) -> None:
        """A request finishes or is aborted, maybe amid its prefill, or is retracted."""
        request = self.requests[pick % len(self.requests)]
        if retract and request.length:
            self.retracted.append((request.length, request.options))
        self.release(request, held=request.length, keep=keep, route=route)

    @precondition(lambda self: self.requests)
    @rule(pick=picks, wanted=options)
    def change_p(self, pick: int, wanted: dict[str, Any]) -> None:
        request = self.requests[pick % len(self.requests)]
        request.options, request.first = wanted, True
        self.admit_slot(request.slot, wanted)

    @precondition(lambda self: self.cached)
    @rule(pick=picks, route=routes)
    def evict(self, pick: int, route: str) -> None:
        chain = self.cached.pop(pick % len(self.cached))
        self.drop(chain, self.token_slots(chain), route)

    @precondition(lambda self: self.pending)
    @rule()
    def idle(self) -> None:
        self.forward(ForwardMode.IDLE, None)

    @precondition(lambda self: self.runtime.pages_built > self.built_at_flush + 4)
    @rule()
    def flush(self) -> None:
        while self.requests:
            self.release(self.requests[0], held=self.requests[0].length, keep=True, route="segment")
        self.cached.clear()
        self.holders.clear()
        self.allocator.clear()
        self.pending = set(range(NUM_PAGES + 1))
        self.built_at_flush = self.runtime.pages_built

    # What must hold.

    def expected_step(self, batch: list[Request]) -> tuple[list[bool], set[int], int]:
        """Which rows are sparse, what gets sealed and how many pages are reused."""
        sparse = [r.p <= 1 and r.length + 1 >= self.min_context for r in batch]
        needed, of_new = set(), []
        for request, is_sparse in zip(batch, sparse, strict=True):
            full = self.pages(request)[: request.length // PS] if is_sparse else []
            needed.update(full)
            of_new += full if request.first else []
        built = needed - self.sealed
        return sparse, built | self.sealed, len(of_new) - len(built & set(of_new))

    def check_step(self, plan: Any, batch: list[Request], expected: tuple) -> None:
        if self.only_audit:
            return
        sparse, sealed, reused = expected
        count = len(batch)
        assert plan.sparse.tolist() == sparse + [False] * (len(plan.sparse) - count)
        assert plan.p[:count].tolist() == pytest.approx([min(r.p, 1) for r in batch])
        for row, request in enumerate(batch):
            pages = self.pages(request, request.length + 1)
            padding = [0] * (plan.page_ids.shape[1] - len(pages))
            assert plan.page_ids[row].tolist() == pages + padding
            request.first = request.first and not sparse[row]
        assert self.sealed == sealed
        built, found, violations = self.counters()
        assert built == self.totals[0] + len(sealed - self.before)
        assert found == self.totals[1] + reused
        assert violations == 0
        self.totals = (built, found, violations)

    def counters(self) -> tuple[int, int, int]:
        runtime = self.runtime
        return runtime.pages_built, runtime.pages_reused, runtime.audit_violations

    def check_audit(self) -> None:
        violations = audit(self.runtime.pool, self.runtime.keys_of)
        assert [v for v in violations if v.page_id not in self.pending] == []
        self.before = self.sealed

    @invariant()
    def summaries_are_those_of_the_keys(self) -> None:
        self.check_audit()

    @invariant()
    def sealed_pages_are_full_and_held(self) -> None:
        if self.only_audit:
            return
        sealed = self.sealed - self.pending
        assert 0 not in self.sealed
        assert not {page for page in sealed if not self.holders[page]}
        for request in self.requests:
            assert not sealed & set(self.pages(request)[request.length // PS :])

    @invariant()
    def no_page_is_lost_by_the_test_itself(self) -> None:
        held = sum(count > 0 for count in self.holders.values())
        assert self.allocator.available_size() == (NUM_PAGES - held) * PS

    @invariant()
    def counters_change_in_decode_steps_only(self) -> None:
        assert self.only_audit or self.counters() == self.totals

    def teardown(self) -> None:
        if hasattr(self, "runtime"):
            self.forward(ForwardMode.IDLE, None)


CHECKED = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, database=None
)


def test_every_order_of_events_keeps_the_invariant() -> None:
    run_state_machine_as_test(Server, settings=CHECKED)


@pytest.mark.nightly
def test_many_random_orders_keep_the_invariant() -> None:
    run_state_machine_as_test(
        Server, settings=settings(max_examples=2000, stateful_step_count=80, deadline=None)
    )


def drop_releases(runtime: TwilightRuntime) -> None:
    runtime.ledger.pages_released = lambda page_ids: None


def release_at_once(runtime: TwilightRuntime) -> None:
    runtime.ledger.pages_released = runtime.pool.unseal


def drop_flushes(runtime: TwilightRuntime) -> None:
    runtime.ledger.all_pages_released = lambda: None


def ignore_extends(runtime: TwilightRuntime) -> None:
    runtime.ledger.tokens_written = lambda token_slots: None


def skip_a_layer(runtime: TwilightRuntime) -> None:
    seal = runtime.pool.seal

    def seal_first_layer_twice(page_ids: torch.Tensor, keys_of: Any) -> None:
        seal(page_ids, lambda layer_id: keys_of(LAYERS[0]))

    runtime.pool.seal = seal_first_layer_twice


def nothing(runtime: TwilightRuntime) -> None:
    """For a break that is not in the runtime."""


@pytest.mark.parametrize(
    "break_it",
    [drop_releases, release_at_once, drop_flushes, ignore_extends, skip_a_layer],
    ids=lambda function: function.__name__.replace("_", "-"),
)
def test_audit_finds_what_is_broken_on_purpose(break_it: Callable) -> None:
    check_is_found(break_it)


def test_audit_finds_open_pages_sealed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_token_early(page_ids: torch.Tensor, seq_lens: torch.Tensor, *rest: Any) -> Any:
        return pages_needed(page_ids, seq_lens + 1, *rest)

    monkeypatch.setattr(runtime_module, "pages_needed", one_token_early)
    check_is_found(nothing)


def check_is_found(break_it: Callable) -> None:
    class Broken(Server):
        only_audit = True

    Broken.break_it = staticmethod(break_it)
    found = settings(CHECKED, max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError, match="Violation"):
        run_state_machine_as_test(Broken, settings=found)
