"""The reference pipeline against dense attention, and what it keeps against an exact recount."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from twilight_sgl.attention import pipeline
from twilight_sgl.attention.pipeline import LayerOutput, decode_reference
from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.kernels.seal.reference import dequantize_int4, summarize

PS = 16
RAGGED = (1, PS - 1, PS, PS + 1, 0, 5 * PS + 3, 40 * PS)


@dataclass(frozen=True)
class Step:
    """One layer of a decode step over a random cache.

    Slots past a request's length, pages of nobody and summaries of pages that are not full hold
    `unused`.
    """

    q: torch.Tensor
    cache: LayerCache
    plan: DecodePlan
    scale: float

    @classmethod
    def draw(
        cls,
        lengths: tuple[int, ...] = RAGGED,
        *,
        heads_kv: int = 2,
        group: int = 3,
        dim: int = 64,
        p: float = 1.0,
        dense: tuple[int, ...] = (),
        unused: float = float("nan"),
        sharpness: float = 1.0,
        centred: bool = False,
    ) -> "Step":
        rng = torch.Generator().manual_seed(0)
        counts = [-(-length // PS) for length in lengths]
        num_pages = 1 + sum(counts) + 2
        shape = (num_pages, PS, heads_kv, dim)
        keys, values = (torch.randn(shape, generator=rng) for _ in range(2))
        written = torch.zeros(num_pages, PS, dtype=torch.bool)
        page_ids = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        order = (torch.randperm(num_pages - 1, generator=rng) + 1).split([*counts, 2])
        full = []
        for row, (length, mine) in enumerate(zip(lengths, order[:-1], strict=True)):
            page_ids[row, : len(mine)] = mine.int()
            written[mine] = (torch.arange(len(mine) * PS) < length).view(-1, PS)
            if row not in dense:
                full += mine[: max(length - 1, 0) // PS].tolist()
        keys[~written], values[~written] = unused, unused
        min_max = torch.full((num_pages, heads_kv, 2, dim), unused)
        codes = torch.full((num_pages, heads_kv, PS, dim // 2), 255, dtype=torch.uint8)
        scale_zero = torch.full((num_pages, heads_kv, PS, 2), unused, dtype=torch.float16)
        min_max[full], codes[full], scale_zero[full] = summarize(keys[full], centred=centred)
        plan = DecodePlan(
            page_ids,
            torch.tensor(lengths, dtype=torch.int32),
            torch.full((len(lengths),), p),
            torch.tensor([length > 0 and row not in dense for row, length in enumerate(lengths)]),
        )
        q = torch.randn(len(lengths), heads_kv * group, dim, generator=rng) * sharpness
        cache = LayerCache(keys, values, min_max, codes, scale_zero)
        return cls(q, cache, plan, dim**-0.5)

    def run(self, selection: Selection, logit_cap: float = 0.0) -> LayerOutput:
        return decode_reference(
            self.q, self.cache, self.plan, selection, sm_scale=self.scale, logit_cap=logit_cap
        )

    def token_slots(self, row: int) -> torch.Tensor:
        """Physical slots of a request's tokens, in order."""
        pages = self.plan.page_ids[row].long()
        slots = pages.view(-1, 1) * PS + torch.arange(PS)
        return slots.flatten()[: int(self.plan.seq_lens[row])]

    def of_row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's keys and values for every query head: [HQ, N, D] each."""
        slots = self.token_slots(row)
        group = self.q.shape[1] // self.cache.keys.shape[2]
        pair = (self.cache.keys, self.cache.values)
        keys, values = (
            cache.flatten(0, 1)[slots].transpose(0, 1).repeat_interleave(group, dim=0)
            for cache in pair
        )
        return keys, values

    def dense(self, row: int) -> torch.Tensor:
        """PyTorch's attention over all of a request's tokens: [HQ, D]."""
        keys, values = self.of_row(row)
        return scaled_dot_product_attention(
            self.q[row].unsqueeze(1), keys, values, scale=self.scale
        ).squeeze(1)

    def weights(self, row: int, keys: torch.Tensor) -> torch.Tensor:
        """Float64 attention weights of a request's tokens: [HQ, N]."""
        logits = torch.einsum("hd,hnd->hn", self.q[row].double(), keys.double()) * self.scale
        return torch.softmax(logits, -1)


ALL = Selection(PS, budget=1.0, sink_tokens=0, recent_tokens=0)
HALF = Selection(PS, budget=0.5, sink_tokens=4, recent_tokens=24)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[list[list[set[int]]]]:
    """After a run, the kept physical slots by request and KV head, in a list of one."""
    seen: list[list[list[set[int]]]] = []
    attend = pipeline.attend

    def spy(q: torch.Tensor, *args: torch.Tensor, **kwargs: float) -> torch.Tensor:
        slots, counts = args[2:4]
        rows = zip(slots.tolist(), counts.tolist(), strict=True)
        seen[:] = [[[set(s[:n]) for s, n in zip(*row, strict=True)] for row in rows]]
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(pipeline, "attend", spy)
    return seen


@pytest.mark.parametrize("estimator", ["int4", "int4_centred", "exact"])
@pytest.mark.parametrize("dim", [64, 80], ids=["D64", "D80"])
@pytest.mark.parametrize("group", [1, 3, 7], ids=["G1", "G3", "G7"])
def test_everything_kept_is_dense_attention(group: int, dim: int, estimator: str) -> None:
    selection = replace(ALL, estimator=estimator)
    step = Step.draw(group=group, dim=dim, centred=selection.centred)
    result = step.run(selection)
    for row, length in enumerate(RAGGED):
        if length:
            assert (result.output[row] - step.dense(row)).abs().max() <= 1e-5
        assert result.candidate_tokens[row].tolist() == [length] * 2
        assert result.kept_tokens[row].tolist() == [length] * 2


def test_padded_rows_are_zero_and_keep_nothing() -> None:
    result = Step.draw((0, PS + 1, 0), p=0.5).run(HALF)
    assert not result.output[[0, 2]].any()
    assert result.output[1].any()
    assert not result.candidate_tokens[[0, 2]].any()
    assert not result.kept_tokens[[0, 2]].any()


@pytest.mark.parametrize("p", [0.5, 0.85, 0.99])
@pytest.mark.parametrize("sharpness", [0.25, 1.0, 4.0], ids=["flat", "plain", "sharp"])
def test_kept_mass_is_at_least_p(kept: list, p: float, sharpness: float) -> None:
    """Of the weights of all tokens, with exact keys and every page a candidate."""
    step = Step.draw(p=p, sharpness=sharpness)
    result = step.run(replace(ALL, estimator="exact"))
    for row, length in enumerate(RAGGED):
        weights = step.weights(row, step.of_row(row)[0]) if length else torch.zeros(6, 0)
        for head, mass in enumerate(weights):
            mine = kept[0][row][head // 3]
            held = sum(
                w
                for w, s in zip(mass.tolist(), step.token_slots(row).tolist(), strict=True)
                if s in mine
            )
            assert length == 0 or held >= p - 1e-6
    assert sharpness < 4 or (result.kept_tokens[-1] < RAGGED[-1] // 2).all()


def test_kept_estimated_mass_is_at_least_p_of_the_candidates(kept: list) -> None:
    """With INT4 keys and a budget, `p` is mass within the candidates."""
    p, row = 0.9, len(RAGGED) - 1
    step = Step.draw(p=p, sharpness=2.0)
    result = step.run(HALF)
    slots = step.token_slots(row)
    open_from = (RAGGED[row] - 1) // PS * PS
    page, offset = slots // PS, slots % PS
    estimate = dequantize_int4(
        step.cache.codes[page, :, offset], step.cache.scale_zero[page, :, offset]
    )
    estimate[open_from:] = step.cache.keys[page[open_from:], offset[open_from:]]
    weights = step.weights(row, estimate.transpose(0, 1).repeat_interleave(3, dim=0))
    # The candidates are what a run that prunes nothing keeps.
    everything = replace(step, plan=replace(step.plan, p=torch.ones_like(step.plan.p)))
    pruned = kept[0][row]
    everything.run(HALF)
    candidates = kept[0][row]
    assert [len(each) for each in candidates] == result.candidate_tokens[row].tolist()
    for head, mass in enumerate(weights):
        of = dict(zip(slots.tolist(), mass.tolist(), strict=True))
        mine, among = pruned[head // 3], candidates[head // 3]
        assert mine < among
        assert sum(of[s] for s in mine) >= (p - 1e-6) * sum(of[s] for s in among)


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (1, 1), (4, 24), (17, 100), (0, 5000)])
def test_forced_tokens_are_kept_whatever_their_weight(kept: list, sink: int, recent: int) -> None:
    step = Step.draw(p=0.01, sharpness=10.0)
    result = step.run(replace(HALF, budget=16, sink_tokens=sink, recent_tokens=recent))
    for row, length in enumerate(RAGGED):
        slots = step.token_slots(row).tolist()
        open_from = max(length - 1, 0) // PS * PS
        forced = {*slots[:sink], *slots[max(length - recent, 0) :], *slots[open_from:]}
        assert all(forced <= mine for mine in kept[0][row])
    assert recent > 600 or (result.kept_tokens[-1] < RAGGED[-1]).all()


def test_selected_pages_are_the_only_candidates(kept: list) -> None:
    result = Step.draw((40 * PS,), p=1.0).run(replace(HALF, budget=10 * PS))
    assert result.candidate_tokens.tolist() == [[10 * PS] * 2]
    assert [len(mine) for mine in kept[0][0]] == [10 * PS] * 2


@pytest.mark.parametrize("group", [1, 3], ids=["G1", "G3"])
def test_without_a_pruner_every_candidate_is_kept(kept: list, group: int) -> None:
    """Whatever p is, and with no INT4 keys to read: as p = 1 keeps them."""
    lengths = (40 * PS + 5, 0, PS)
    selection = replace(HALF, budget=10 * PS)
    all_mass = Step.draw(lengths, group=group, p=1.0).run(selection)
    kept_by_all_mass = [list(heads) for heads in kept[0]]
    step = Step.draw(lengths, group=group, p=0.1)
    blind = replace(step, cache=replace(step.cache, codes=None, scale_zero=None))
    result = blind.run(replace(selection, pruner="none"))
    assert kept[0] == kept_by_all_mass
    assert torch.equal(result.kept_tokens, all_mass.kept_tokens)
    assert torch.equal(result.candidate_tokens, result.kept_tokens)
    assert torch.equal(result.output, all_mass.output)
    assert 0 < int(result.kept_tokens[0].max()) < lengths[0]


def test_dense_rows_need_no_summaries_and_no_p() -> None:
    lengths = (7 * PS + 3, 20 * PS, PS)
    step = Step.draw(lengths, p=0.1, dense=(0, 2))
    result = step.run(replace(HALF, budget=16))
    assert (result.kept_tokens[1] < lengths[1]).all()
    for row in (0, 2):
        assert result.kept_tokens[row].tolist() == [lengths[row]] * 2
        assert (result.output[row] - step.dense(row)).abs().max() <= 1e-5


def test_rows_do_not_depend_on_each_other() -> None:
    lengths = (9 * PS + 1, 30 * PS, 3 * PS)
    step = Step.draw(lengths, p=0.8, dense=(2,), sharpness=2.0)
    together = step.run(HALF)
    for row in range(3):
        plan = DecodePlan(
            step.plan.page_ids[row : row + 1],
            step.plan.seq_lens[row : row + 1],
            step.plan.p[row : row + 1],
            step.plan.sparse[row : row + 1],
        )
        alone = replace(step, q=step.q[row : row + 1], plan=plan).run(HALF)
        assert torch.equal(alone.kept_tokens[0], together.kept_tokens[row])
        assert (alone.output[0] - together.output[row]).abs().max() <= 1e-6


@pytest.mark.parametrize("estimator", ["int4", "int4_centred", "exact"])
@pytest.mark.parametrize("p", [0.8, 1.0])
def test_memory_that_nothing_wrote_changes_nothing(p: float, estimator: str) -> None:
    selection = replace(HALF, estimator=estimator)
    clean, poisoned, large = (
        Step.draw(p=p, dense=(5,), unused=unused, centred=selection.centred).run(selection)
        for unused in (0.0, float("nan"), 3e4)
    )
    for other in (poisoned, large):
        assert torch.equal(other.output, clean.output)
        assert torch.equal(other.kept_tokens, clean.kept_tokens)
        assert torch.equal(other.candidate_tokens, clean.candidate_tokens)
    assert clean.output.isfinite().all()


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_soft_cap(cap: float) -> None:
    step = Step.draw(sharpness=4.0)
    result = step.run(ALL, logit_cap=cap)
    for row, length in enumerate(RAGGED):
        if not length:
            continue
        keys, values = step.of_row(row)
        logits = torch.einsum("hd,hnd->hn", step.q[row].double(), keys.double()) * step.scale
        weights = torch.softmax(cap * torch.tanh(logits / cap), -1)
        expected = torch.einsum("hn,hnd->hd", weights, values.double())
        assert (result.output[row] - expected).abs().max() <= 1e-5


def test_p_differs_by_row() -> None:
    step = Step.draw((20 * PS,) * 3, p=1.0)
    same = torch.zeros(3, dtype=torch.long)
    plan = replace(
        step.plan,
        page_ids=step.plan.page_ids[same],
        p=torch.tensor([0.3, 0.7, 1.0]),
    )
    result = replace(step, q=step.q[same], plan=plan).run(replace(ALL, recent_tokens=1))
    counts = result.kept_tokens
    assert (counts[0] < counts[1]).all() and (counts[1] < counts[2]).all()
    assert counts[2].tolist() == [20 * PS] * 2
