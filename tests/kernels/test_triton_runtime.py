"""What the GPU runtime counts, against a recount on the host and the CPU's runtime."""

from dataclasses import replace

import pytest
import torch
from served import COLUMNS, DENSE_LAYER, DEVICE, HEADS_KV, LAYERS, NUM_PAGES, PS, Served

from twilight_sgl.attention.pipeline import decode_reference
from twilight_sgl.attention.plan import LayerCache
from twilight_sgl.attention.runtime import TwilightRuntime
from twilight_sgl.attention.triton_runtime import _TURNS
from twilight_sgl.request import RequestOptions

# Rows' slots and lengths: slot 3 is dense, slot 0 padding.
STEPS = [
    ([2, 3, 0, 1], [12 * PS - 3, 4 * PS - 2, 1, 6 * PS + 5]),
    ([1, 2], [6 * PS + 6, 12 * PS - 2]),
]
SPARSE_ROWS = sum(slot in (1, 2) for slots, _ in STEPS for slot in slots)


@pytest.fixture(scope="module")
def served() -> Served:
    """After two steps, what it counted and what a recount says."""
    served = Served()
    served.sums, served.expected_sums = [], []
    served.tokens = torch.zeros((len(LAYERS), HEADS_KV, 3), dtype=torch.int64)
    served.mass = torch.zeros((len(LAYERS), HEADS_KV), dtype=torch.float64)
    for slots, lengths in STEPS:
        served.sums.append(served.step(slots, lengths))
        candidates, kept, masses = served.counted(len(slots))
        rows = []
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            if slot not in (1, 2):
                rows.append([0.0] * 4)
                continue
            served.tokens[..., 0] += length
            served.tokens[..., 1] += candidates[:, row]
            served.tokens[..., 2] += kept[:, row]
            served.mass += masses[:, row]
            context = length * len(LAYERS) * HEADS_KV
            counts = candidates[:, row].sum(), kept[:, row].sum(), masses[:, row].sum()
            rows.append([context, *map(float, counts)])
        served.expected_sums.append(torch.tensor(rows, dtype=torch.float64))
    return served


def test_totals_by_layer_and_head_are_a_recount(served: Served) -> None:
    now = served.runtime.snapshot()
    counts = (now.context_tokens, now.candidate_tokens, now.kept_tokens)
    for found, expected in zip(counts, served.tokens.unbind(-1), strict=True):
        assert found.tolist() == expected.tolist()
    assert now.kept_mass.tolist() == [pytest.approx(row, rel=1e-12) for row in served.mass.tolist()]
    assert (now.sparse_rows, now.decode_steps) == (SPARSE_ROWS, len(STEPS))
    full = {1: 6, 2: 11}  # pages before the newest token's, of which the two share two
    assert (now.pages_built, now.pages_reused) == (sum(full.values()) - 2, 2)
    assert (now.pages_sealed, now.pages_capacity) == (now.pages_built, NUM_PAGES - 1)
    assert (now.sealing_seconds > 0) == (DEVICE == "cuda")  # the interpreter has no clock


def test_row_sums_are_a_recount(served: Served) -> None:
    for found, expected in zip(served.sums, served.expected_sums, strict=True):
        torch.testing.assert_close(found[:, :4], expected, rtol=1e-12, atol=0)
    assert served.sums[0][:, 4].sum() == 2 and served.sums[1][:, 4].sum() == 0
    assert served.runtime.take_row_sums() is None


def test_the_cpu_runtime_counts_the_same(served: Served) -> None:
    runtime = served.runtime
    reference = TwilightRuntime(runtime.config, runtime._kv_pool, LAYERS, 5)
    options = {1: RequestOptions(), 2: RequestOptions(p=0.5), 3: RequestOptions(enabled=False)}
    reference.on_requests_admitted(list(options), options.values())
    reference.ledger.apply()
    for slots, lengths in STEPS:
        rows = torch.tensor(slots, device=DEVICE), torch.tensor(lengths, device=DEVICE)
        plan = reference.begin_decode(served.table, *rows)
        for layer in LAYERS:
            result = decode_reference(
                served.q[: len(slots)],
                reference.cache_of(layer),
                plan,
                reference.selection,
                sm_scale=0.125,
            )
            reference.count_layer(plan, result)
    found, expected = runtime.snapshot(), reference.snapshot()
    assert found.context_tokens.tolist() == expected.context_tokens.tolist()
    assert found.candidate_tokens.tolist() == expected.candidate_tokens.tolist()
    assert found.kept_tokens.sum() == pytest.approx(expected.kept_tokens.sum(), rel=0.02)
    assert found.kept_mass.sum() == pytest.approx(expected.kept_mass.sum(), rel=0.02)
    assert found.sparse_rows == expected.sparse_rows
    assert found.pages_reused == expected.pages_reused


def test_a_slot_given_to_another_request_starts_anew() -> None:
    served = Served()
    first = served.step([1], [6 * PS + 5])
    served.admit({1: RequestOptions()})
    second = served.step([1], [6 * PS + 5])
    assert second[:, :4].equal(first[:, :4])
    assert (first[0, 4], second[0, 4]) == (0, 6)


def test_row_sums_outlive_the_steps_that_overlap() -> None:
    served, taken = Served(), []
    for length in (5 * PS, 6 * PS, 4 * PS):
        served.runtime.begin_step(dense=False)
        served.plan([1], [length])
        served.decode(1)
        taken.append(served.runtime.take_row_sums())
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    contexts = [5 * PS, 6 * PS, 4 * PS]
    assert [sums[0, 0] for sums in taken] == [n * len(LAYERS) * HEADS_KV for n in contexts]
    is_kept = served.runtime.row_sums_kept()
    for _ in range(_TURNS - 1):
        served.plan([1], [PS])
    assert is_kept()
    served.plan([1], [PS])
    assert not is_kept()


def test_dense_steps_have_no_row_sums() -> None:
    served = Served()
    served.step([1], [6 * PS])
    served.runtime.begin_step(dense=True)
    assert served.runtime.take_row_sums() is None
    assert served.runtime.snapshot().dense_steps == 1


@pytest.mark.parametrize("dense", [True, False], ids=["dense-step", "dense-layer"])
def test_what_does_not_select_attends_to_all(dense: bool) -> None:
    served = Served()
    runtime, (slots, lengths) = served.runtime, STEPS[0]
    rows = torch.tensor(slots, device=DEVICE), torch.tensor(lengths, device=DEVICE)
    runtime.begin_step(dense=dense)
    plan = runtime.begin_decode(served.table, *rows, dense=dense)
    everything = replace(plan, sparse=torch.zeros_like(plan.sparse))
    q = served.q[: len(slots)]
    for layer in (*LAYERS, DENSE_LAYER) if dense else (DENSE_LAYER,):
        summaries = runtime.pool.of_layer(LAYERS[0])  # of no use to rows that are not sparse
        cache = LayerCache(runtime.keys_of(layer), runtime.values_of(layer), *summaries)
        expected = decode_reference(q, cache, everything, runtime.selection, sm_scale=0.125).output
        got = runtime.run_layer(layer, q, sm_scale=0.125, logit_cap=0.0, sinks=None)
        assert (got - expected).norm() / expected.norm() < 1e-2
    assert plan.sparse.any() == (not dense)
    assert runtime.pages_built == (0 if dense else 15)
    assert not runtime.serves(0)


def test_dense_steps_of_many_rows_need_no_workspaces_of_selection() -> None:
    served = Served()
    slots, lengths = [1, 2] * 5, [5 * PS, 7 * PS] * 5  # more rows than were reserved
    rows = torch.tensor(slots, device=DEVICE), torch.tensor(lengths, device=DEVICE)
    q = torch.randn((10, *served.q.shape[1:]), device=DEVICE).to(served.q.dtype)
    outputs = []
    for dense in (True, False, True):
        served.runtime.begin_decode(served.table, *rows, dense=dense)
        assert (served.runtime._buffers[-1].decode is None) == (dense and not outputs)
        out = served.runtime.run_layer(DENSE_LAYER, q, sm_scale=0.125, logit_cap=0.0, sinks=None)
        outputs.append(out)
    assert len(served.runtime._buffers) == 2
    for buffers in served.runtime._buffers:
        assert buffers.decode is not None and buffers.decode.attend_workspace is buffers.workspace
    assert outputs[0].equal(outputs[1]) and outputs[0].equal(outputs[2])
    assert outputs[0].isfinite().all()


def test_without_a_pruner_all_mass_is_kept() -> None:
    served = Served(pruner="none")
    served.step([1, 2], [COLUMNS // 2 * PS, COLUMNS * PS - 1])
    now = served.runtime.snapshot()
    assert now.kept_tokens.tolist() == now.candidate_tokens.tolist()
    assert (now.kept_mass == now.sparse_rows).all()


@pytest.mark.parametrize("bounds", ["keys", "float8"])
def test_the_audit_knows_centred_keys(bounds: str) -> None:
    served = Served(estimator="int4_centred", bounds=bounds)
    served.step([1, 2], [6 * PS + 5, 12 * PS - 3])
    runtime = served.runtime
    assert runtime.run_audit() == []
    for layer in LAYERS:
        row = runtime.pool.row_of(layer)
        runtime.pool.codes[row, 1, 0, 0, 0] ^= 1
    found = [(violation.layer_id, violation.fields) for violation in runtime.run_audit()]
    assert found == [(layer, ("codes",)) for layer in LAYERS]


def test_slots_are_allocated_where_the_hook_looks_for_it() -> None:
    served = Served()
    rows = torch.tensor([1], device=DEVICE), torch.tensor([5], device=DEVICE)
    free_pages = torch.tensor([9], device=DEVICE)
    slots, *_ = served.runtime.next_slots(served.table, *rows, rows[1], free_pages)
    assert slots.tolist() == [PS + 5]


def test_without_telemetry_nothing_is_counted() -> None:
    served = Served(telemetry=False)
    assert served.step([1], [6 * PS + 5]) is None
    assert served.runtime.poll_snapshot() is None
    now = served.runtime.snapshot()
    assert now.sparse_rows == now.context_tokens.sum() == now.sealing_seconds == 0
    assert now.pages_built == 6
