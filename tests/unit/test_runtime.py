"""A runtime's decode plans, its sealing, and what it counts."""

import json
from types import SimpleNamespace

import pytest
import torch

from twilight_sgl.attention.pipeline import LayerOutput, decode_reference
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
        values = {"p": P_OF_SERVER, "min_context_tokens": 0, "min_candidate_tokens": 0}
        values |= {"recent_tokens": 1, "sink_tokens": 1}
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
    assert (server.pages["built"], server.pages["reused"]) == (4, 1)
    assert (server.pages["capacity"], server.pages["sealed"]) == (10, 4)


def test_a_slot_given_to_another_request_counts_reuse_again(server: Server) -> None:
    server.step([1], [2 * PS + 1])
    server.admit({1: RequestOptions()})
    server.step([1], [2 * PS + 1])
    assert (server.pages["built"], server.pages["reused"]) == (2, 2)


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


# Slot 3 is dense, slot 0 padding; slots 2 and 1 share their first page.
SLOTS, LENGTHS = [2, 3, 0, 1], [3 * PS + 5, PS + 3, 1, 2 * PS + 2]


def decode(server: Server, steps: int) -> list[dict[int, LayerOutput]]:
    """Run decode steps of `SLOTS`: what each layer of each step computed."""
    server.admit({3: RequestOptions(enabled=False)})
    q = torch.randn(len(SLOTS), 2 * HEADS_KV, DIM, generator=torch.Generator().manual_seed(1))
    done = []
    for _ in range(steps):
        plan = server.step(SLOTS, LENGTHS)
        results = {}
        for layer in LAYERS:
            cache = server.runtime.cache_of(layer)
            results[layer] = decode_reference(
                q, cache, plan, server.runtime.selection, sm_scale=1.0
            )
            server.runtime.count_layer(plan, results[layer])
        done.append(results)
    return done


def test_snapshot_is_a_recount_of_sparse_rows(server: Server) -> None:
    done = decode(server, 2)
    now = server.runtime.snapshot()
    for row, layer in enumerate(LAYERS):
        outputs = [step[layer] for step in done]
        for head in range(HEADS_KV):
            counted = [(output, r) for output in outputs for r in (0, 3)]
            group = slice(2 * head, 2 * head + 2)
            assert now.context_tokens[row, head] == 2 * (LENGTHS[0] + LENGTHS[3])
            assert now.candidate_tokens[row, head] == sum(
                int(output.candidate_tokens[r, head]) for output, r in counted
            )
            assert now.kept_tokens[row, head] == sum(
                int(output.kept_tokens[r, head]) for output, r in counted
            )
            masses = [float(output.kept_mass[r, group].mean()) for output, r in counted]
            assert now.kept_mass[row, head] == pytest.approx(sum(masses))
    assert now.layer_ids == LAYERS
    assert (now.sparse_rows, now.decode_steps, now.dense_steps, now.mixed_rows) == (4, 2, 0, 0)
    assert (now.pages_capacity, now.pages_sealed) == (10, 4)
    assert (now.pages_built, now.pages_reused) == (4, 1)
    assert now.sealing_seconds > 0
    assert 0 < now.kept_tokens.sum() < now.candidate_tokens.sum() < now.context_tokens.sum()


def test_a_snapshot_stays_as_it_was(server: Server) -> None:
    decode(server, 1)
    first = server.runtime.snapshot()
    kept = first.kept_tokens.copy()
    decode(server, 1)
    assert (first.kept_tokens == kept).all()
    assert (server.runtime.snapshot().kept_tokens == 2 * kept).all()


def test_polling_needs_no_waiting_on_a_cpu(server: Server) -> None:
    decode(server, 1)
    polled, read = server.runtime.poll_snapshot(), server.runtime.snapshot()
    assert polled is not None
    assert polled.to_dict() == read.to_dict()
    assert polled.time <= read.time


def test_state_shows_totals_and_means_by_head(server: Server) -> None:
    decode(server, 2)
    state, now = server.runtime.state(), server.runtime.snapshot()
    budget = state["budget"]
    assert budget["context_tokens"] == now.context_tokens.sum()
    assert budget["candidate_tokens"] == now.candidate_tokens.sum()
    assert budget["kept_tokens"] == now.kept_tokens.sum()
    assert budget["kept_mass"] == pytest.approx(now.kept_mass.sum() / (4 * len(LAYERS) * HEADS_KV))
    assert P_OF_SERVER <= budget["kept_mass"] <= 1
    assert state["heads"]["layer_ids"] == list(LAYERS)
    for row in range(len(LAYERS)):
        for head in range(HEADS_KV):
            fraction = now.kept_tokens[row, head] / now.context_tokens[row, head]
            assert state["heads"]["kept_fraction"][row][head] == pytest.approx(fraction, abs=1e-6)
            mass = now.kept_mass[row, head] / 4
            assert state["heads"]["kept_mass"][row][head] == pytest.approx(mass, abs=1e-6)
    assert torch.__version__.startswith(state["versions"]["torch"])
    assert set(state["versions"]) == {"twilight_sgl", "sglang", "torch", "triton"}
    assert json.loads(json.dumps(state)) == state


def test_state_before_any_step_has_no_means(server: Server) -> None:
    state = server.runtime.state()
    assert state["budget"]["kept_mass"] is None
    assert state["heads"]["kept_fraction"] is state["heads"]["kept_mass"] is None
    assert state["pages"] == {
        "capacity": 10,
        "sealed": 0,
        "built": 0,
        "reused": 0,
        "sealing_seconds": 0.0,
    }


def test_row_sums_are_taken_once_and_recount_the_step(server: Server) -> None:
    assert server.runtime.take_row_sums() is None
    (done,) = decode(server, 1)
    sums = server.runtime.take_row_sums()
    assert sums is not None
    assert server.runtime.take_row_sums() is None
    for row, slot in enumerate(SLOTS):
        context, candidates, kept, mass, reused = sums[row].tolist()
        if slot in (0, 3):
            assert sums[row].tolist() == [0.0] * 5
            continue
        assert context == LENGTHS[row] * len(LAYERS) * HEADS_KV
        assert candidates == sum(int(o.candidate_tokens[row].sum()) for o in done.values())
        assert kept == sum(int(o.kept_tokens[row].sum()) for o in done.values())
        assert mass == pytest.approx(sum(float(o.kept_mass[row].sum()) / 2 for o in done.values()))
        assert reused == {2: 0, 1: 1}[slot]  # slot 1 finds the page that slot 2, before it, seals
    decode(server, 1)
    again = server.runtime.take_row_sums()
    assert again is not None
    assert (again[:, :4] == sums[:, :4]).all() and not again[:, 4].any()


def test_row_sums_stay_where_no_request_gets_a_report(server: Server) -> None:
    server.runtime.reports_requests = False
    decode(server, 1)
    assert server.runtime.take_row_sums() is None


def test_without_telemetry_nothing_is_counted() -> None:
    server = Server(telemetry=False)
    decode(server, 2)
    assert server.runtime.take_row_sums() is None
    assert server.runtime.poll_snapshot() is None
    state = server.runtime.state()
    assert state["budget"]["context_tokens"] == state["budget"]["kept_tokens"] == 0
    assert state["pages"]["built"] == 4  # sealing needs these, telemetry or not
    assert state["steps"]["decode"] == 2


def test_a_report_names_the_p_in_force(server: Server) -> None:
    class Req:
        """A request that a report can refer to."""

    req = Req()
    in_force = {
        P_OF_SERVER: RequestOptions(),
        0.5: RequestOptions(p=0.5),
        None: RequestOptions(p=0.5, enabled=False),
    }
    for p, options in in_force.items():
        report = server.runtime.report_for(req, options)
        assert report is not None
        report.add(1, 600.0, 60.0, 2.0, reused=1.0)
        assert report.to_dict() == {
            "p": p,
            "steps": 1,
            "average_budget": 60 / (len(LAYERS) * HEADS_KV),
            "kept_fraction": 0.1,
            "kept_mass": 2 / (len(LAYERS) * HEADS_KV),
            "prefix_pages_reused": 1,
        }
    assert Server(telemetry=False).runtime.report_for(req, RequestOptions()) is None


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
@pytest.mark.parametrize("estimator", ["int4", "int4_centred", "exact"])
def test_settings_choose_what_summaries_hold(bounds: str, estimator: str) -> None:
    server = Server(bounds=bounds, estimator=estimator)
    pool = server.runtime.pool
    dtype = torch.float8_e4m3fn if bounds == "float8" else torch.float32
    assert pool.min_max.dtype == dtype
    assert (pool.codes is None) == (pool.scale_zero is None) == (estimator == "exact")
    has_codes = estimator != "exact"
    per_token = summary_bytes_per_token(HEADS_KV, DIM, dtype.itemsize, PS, has_codes)
    assert pool.nbytes - pool.sealed.nbytes == per_token * len(LAYERS) * 11 * PS

    plan = server.step([1, 2], [2 * PS + 5, 3 * PS + 5])
    assert server.runtime.run_audit() == []
    q = torch.randn(2, 2 * HEADS_KV, DIM, generator=torch.Generator().manual_seed(1))
    cache = server.runtime.cache_of(4)
    result = decode_reference(q, cache, plan, server.runtime.selection, sm_scale=1.0)
    assert result.output.isfinite().all()
    server.keys[4, 7 * PS, 0, 0] = 77.0
    fields = ("min_max", "codes", "scale_zero") if has_codes else ("min_max",)
    assert server.runtime.run_audit() == [Violation(7, 4, fields)]


def test_rows_of_dense_steps_are_counted_where_they_would_have_been_sparse() -> None:
    runtime = Server(min_context_tokens=100).runtime
    options = [RequestOptions(), RequestOptions(p=0.5), RequestOptions(enabled=False)]
    runtime.on_dense_step([100, 4000, 4000], options)
    runtime.on_dense_step([99], [RequestOptions()])
    assert runtime.state()["budget"]["mixed_rows"] == 2
