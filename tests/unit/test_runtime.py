"""A runtime's decode plans, its sealing, and what it counts."""

from types import SimpleNamespace

import pytest
import torch

from twilight_sgl.attention.pipeline import decode_reference
from twilight_sgl.attention.plan import DecodePlan
from twilight_sgl.attention.runtime import TwilightRuntime
from twilight_sgl.config import TwilightConfig
from twilight_sgl.pages.audit import Violation
from twilight_sgl.pages.pool import summary_bytes_per_token
from twilight_sgl.request import RequestOptions

PS = 16
LAYERS = (2, 4)
HEADS_KV, DIM = 2, 8
MAX_TOKENS = 12 * PS
# Physical pages of the requests in slots 1 to 3; they share their first page.
PAGES = {1: [4, 2, 9], 2: [4, 7, 1, 5], 3: [4, 3]}
P_OF_SERVER = 0.75


class Server:
    """A runtime over a random KV cache, with the requests of `PAGES` admitted."""

    def __init__(self, **settings: object) -> None:
        rng = torch.Generator().manual_seed(0)
        shape = (max(LAYERS) + 1, 11 * PS, HEADS_KV, DIM)
        self.keys, self.values = (torch.randn(shape, generator=rng) for _ in range(2))
        pool = SimpleNamespace(
            get_key_buffer=self.keys.__getitem__, get_value_buffer=self.values.__getitem__
        )
        values = {"p": P_OF_SERVER, "min_context_tokens": 0, "recent_tokens": 1, "sink_tokens": 1}
        self.runtime = TwilightRuntime(TwilightConfig(**(values | settings)), pool, LAYERS, 5)
        self.table = torch.full((5, MAX_TOKENS), 10 * PS, dtype=torch.int32)  # stale slots
        for slot, pages in PAGES.items():
            slots = torch.tensor(pages).view(-1, 1) * PS + torch.arange(PS)
            self.table[slot, : slots.numel()] = slots.flatten().int()
        self.admit({slot: RequestOptions() for slot in PAGES})

    def admit(self, options: dict[int, RequestOptions]) -> None:
        self.runtime.on_requests_admitted(list(options), options.values())
        self.runtime.ledger.apply()

    def step(self, slots: list[int], lengths: list[int]) -> DecodePlan:
        return self.runtime.begin_decode(self.table, torch.tensor(slots), torch.tensor(lengths))

    @property
    def sealed(self) -> list[int]:
        return self.runtime.pool.sealed.nonzero().squeeze(1).tolist()

    @property
    def pages(self) -> dict[str, int]:
        return self.runtime.state()["pages"]


@pytest.fixture
def server() -> Server:
    return Server()


def test_plan_describes_the_rows_of_a_step(server: Server) -> None:
    plan = server.step([2, 0, 1], [3 * PS + 1, 9, 2 * PS])
    assert plan.page_ids.tolist() == [[4, 7, 1, 5], [0, 0, 0, 0], [4, 2, 0, 0]]
    assert plan.seq_lens.tolist() == [3 * PS + 1, 0, 2 * PS]
    assert plan.p.tolist() == [P_OF_SERVER] * 3
    assert plan.sparse.tolist() == [True, False, True]


def test_plan_is_a_snapshot(server: Server) -> None:
    plan = server.step([1], [PS + 1])
    server.table.zero_()
    server.admit({1: RequestOptions(p=0.125)})
    assert plan.page_ids.tolist() == [[4, 2]]
    assert plan.p.tolist() == [P_OF_SERVER]


def test_step_of_padding_only(server: Server) -> None:
    plan = server.step([0, 0], [1, 1])
    assert plan.seq_lens.tolist() == [0, 0]
    assert not plan.sparse.any()
    assert server.sealed == []


def test_p_of_each_request(server: Server) -> None:
    server.admit({1: RequestOptions(p=0.5), 2: RequestOptions(p=1.0)})
    plan = server.step([3, 2, 1], [PS, PS, PS])
    assert plan.p.tolist() == [P_OF_SERVER, 1.0, 0.5]
    assert plan.sparse.all()


def test_a_request_that_opts_out_is_dense_and_seals_nothing(server: Server) -> None:
    server.admit({1: RequestOptions(p=0.5, enabled=False)})
    plan = server.step([1, 3], [2 * PS + 1, PS + 1])
    assert plan.sparse.tolist() == [False, True]
    assert (plan.p <= 1).all()
    assert server.sealed == [4]
    server.admit({1: RequestOptions(p=0.5)})
    assert server.step([1], [2 * PS + 1]).sparse.all()
    assert server.sealed == [2, 4]


@pytest.mark.parametrize(("length", "sparse"), [(39, False), (40, True), (41, True)])
def test_short_requests_are_dense(length: int, sparse: bool) -> None:
    server = Server(min_context_tokens=40)
    assert server.step([1], [length]).sparse.tolist() == [sparse]
    assert server.sealed == ([2, 4] if sparse else [])


def test_admitted_p_waits_for_the_ledger(server: Server) -> None:
    server.runtime.on_requests_admitted([1], [RequestOptions(p=0.5)])
    assert server.step([1], [PS]).p.tolist() == [P_OF_SERVER]
    server.runtime.ledger.apply()
    assert server.step([1], [PS]).p.tolist() == [0.5]


def test_one_option_for_each_slot(server: Server) -> None:
    with pytest.raises(ValueError, match="zip"):
        server.runtime.on_requests_admitted([1, 2], [RequestOptions()])


def test_pages_are_built_once_and_reused_by_later_requests(server: Server) -> None:
    server.step([1], [2 * PS + 1])
    assert server.sealed == [2, 4]
    assert (server.pages["built"], server.pages["reused"]) == (2, 0)
    server.step([1, 2], [2 * PS + 2, 3 * PS + 1])
    assert server.sealed == [1, 2, 4, 7]
    assert (server.pages["built"], server.pages["reused"]) == (4, 1)
    server.step([1, 2], [2 * PS + 3, 3 * PS + 2])
    assert server.pages == {"capacity": 10, "sealed": 4, "built": 4, "reused": 1}


def test_a_slot_given_to_another_request_counts_reuse_again(server: Server) -> None:
    server.step([1], [2 * PS + 1])
    server.admit({1: RequestOptions()})
    server.step([1], [2 * PS + 1])
    assert (server.pages["built"], server.pages["reused"]) == (2, 2)


def test_an_extend_unseals_the_pages_it_writes(server: Server) -> None:
    server.step([2], [3 * PS + 1])
    server.runtime.begin_extend(torch.tensor([7 * PS + 15, 1 * PS, 0]))
    assert server.sealed == [4]


@pytest.mark.parametrize("page", [1, 4])
def test_audit_counts_and_unseals_what_it_finds(server: Server, page: int) -> None:
    server.step([2], [3 * PS + 1])
    assert server.runtime.run_audit() == []
    server.keys[4, page * PS + 3] = 50.0
    found = server.runtime.run_audit()
    assert found == [Violation(page, 4, ("min_max", "codes", "scale_zero"))]
    assert server.sealed == sorted({1, 4, 7} - {page})
    assert server.runtime.run_audit() == []
    assert server.runtime.state()["audit"] == {"checks": 3, "violations": 1}


def test_audit_runs_every_so_many_steps_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(audit_interval=3)
    server.step([1], [2 * PS + 1])
    server.keys[2, 9 * PS] = 50.0  # not sealed
    server.keys[2, 4 * PS] = 50.0
    server.step([1], [2 * PS + 2])
    assert server.runtime.audit_checks == 0
    server.step([1], [2 * PS + 3])
    assert (server.runtime.audit_checks, server.runtime.audit_violations) == (1, 1)
    assert "page 4, layer 2: min_max and codes and scale_zero differ" in caplog.text
    server.step([1], [2 * PS + 4])
    assert server.sealed == [2, 4]
    assert server.runtime.pages_built == 3


def test_budget_counts_sparse_rows_over_layers_and_heads(server: Server) -> None:
    server.admit({3: RequestOptions(enabled=False)})
    slots, lengths = [2, 3, 0, 1], [3 * PS + 5, PS + 3, 1, 2 * PS + 2]
    q = torch.randn(4, 2 * HEADS_KV, DIM, generator=torch.Generator().manual_seed(1))
    context = candidates = kept = 0
    for _ in range(2):
        plan = server.step(slots, lengths)
        for layer in LAYERS:
            cache = server.runtime.cache_of(layer)
            result = decode_reference(q, cache, plan, server.runtime.selection, sm_scale=1.0)
            server.runtime.count_budget(plan, result.candidate_tokens, result.kept_tokens)
            for row in (0, 3):
                context += lengths[row] * HEADS_KV
                candidates += sum(result.candidate_tokens[row].tolist())
                kept += sum(result.kept_tokens[row].tolist())
    assert 0 < kept < candidates < context
    assert server.runtime.state()["budget"] == {
        "context_tokens": context,
        "candidate_tokens": candidates,
        "kept_tokens": kept,
        "mixed_rows": 0,
    }


def test_state_shows_the_configuration(server: Server) -> None:
    shown = server.runtime.state()["config"]
    assert TwilightConfig.from_mapping(shown, "state") == server.runtime.config


def test_cache_of_a_layer_is_a_view_of_the_pool(server: Server) -> None:
    cache = server.runtime.cache_of(4)
    assert cache.keys.shape == cache.values.shape == (11, PS, HEADS_KV, DIM)
    assert cache.keys[3, 5].data_ptr() == server.keys[4, 3 * PS + 5].data_ptr()
    assert cache.values[3, 5].data_ptr() == server.values[4, 3 * PS + 5].data_ptr()
    with pytest.raises(KeyError):
        server.runtime.cache_of(3)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("page_ids", torch.zeros(2, 3, dtype=torch.int64)),
        ("page_ids", torch.zeros(3, 3, dtype=torch.int32)),
        ("p", torch.zeros(2, dtype=torch.float64)),
        ("sparse", torch.zeros(2, dtype=torch.int32)),
        ("sparse", torch.zeros(1, dtype=torch.bool)),
    ],
    ids=["page_ids type", "page_ids rows", "p type", "sparse type", "sparse rows"],
)
def test_plan_checks_itself(name: str, wrong: torch.Tensor) -> None:
    fields = {
        "page_ids": torch.zeros(2, 3, dtype=torch.int32),
        "seq_lens": torch.zeros(2, dtype=torch.int32),
        "p": torch.zeros(2),
        "sparse": torch.zeros(2, dtype=torch.bool),
    }
    assert DecodePlan(**fields).seq_lens.shape == (2,)
    with pytest.raises(ValueError, match=rf"DecodePlan\.{name} must be"):
        DecodePlan(**fields | {name: wrong})


@pytest.mark.parametrize("bounds", ["keys", "float8"])
@pytest.mark.parametrize("estimator", ["int4", "exact"])
def test_settings_choose_what_summaries_hold(bounds: str, estimator: str) -> None:
    server = Server(bounds=bounds, estimator=estimator)
    pool = server.runtime.pool
    dtype = torch.float8_e4m3fn if bounds == "float8" else torch.float32
    assert pool.min_max.dtype == dtype
    assert (pool.codes is None) == (pool.scale_zero is None) == (estimator == "exact")
    per_token = summary_bytes_per_token(HEADS_KV, DIM, dtype.itemsize, PS, estimator == "int4")
    assert pool.nbytes - pool.sealed.nbytes == per_token * len(LAYERS) * 11 * PS

    plan = server.step([1, 2], [2 * PS + 5, 3 * PS + 5])
    assert server.runtime.run_audit() == []
    q = torch.randn(2, 2 * HEADS_KV, DIM, generator=torch.Generator().manual_seed(1))
    cache = server.runtime.cache_of(4)
    result = decode_reference(q, cache, plan, server.runtime.selection, sm_scale=1.0)
    assert result.output.isfinite().all()
    server.keys[4, 7 * PS, 0, 0] = 77.0
    fields = ("min_max", "codes", "scale_zero") if estimator == "int4" else ("min_max",)
    assert server.runtime.run_audit() == [Violation(7, 4, fields)]


def test_rows_of_dense_steps_are_counted_where_they_would_have_been_sparse() -> None:
    runtime = Server(min_context_tokens=100).runtime
    options = [RequestOptions(), RequestOptions(p=0.5), RequestOptions(enabled=False)]
    runtime.on_dense_step([100, 4000, 4000], options)
    runtime.on_dense_step([99], [RequestOptions()])
    assert runtime.state()["budget"]["mixed_rows"] == 2
