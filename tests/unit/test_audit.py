"""The audit finds every summary that is not that of the page's keys, and says where and what."""

import pytest
import torch

from twilight_sgl.pages import audit as audit_module
from twilight_sgl.pages.audit import Violation, audit
from twilight_sgl.pages.pool import FIELDS, SummaryPool

LAYERS = (2, 5)
SHAPE = (8, 16, 2, 8)  # P, PS, HK, D
SEALED = [1, 3, 4, 6, 7]


class Sealed:
    """A pool whose pages of `SEALED` were sealed from `keys`."""

    def __init__(
        self,
        dtype: torch.dtype,
        bounds: torch.dtype | None = None,
        has_codes: bool = True,
        centred: bool = False,
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        self.keys = {layer: torch.randn(SHAPE, generator=rng).to(dtype) for layer in LAYERS}
        pages, page_size, heads_kv, dim = SHAPE
        self.pool = SummaryPool(
            layer_ids=LAYERS,
            num_pages=pages,
            page_size=page_size,
            heads_kv=heads_kv,
            dim=dim,
            dtype=bounds or dtype,
            device="cpu",
            has_codes=has_codes,
            centred=centred,
        )
        self.pool.seal(torch.tensor(SEALED), self.keys.__getitem__)

    def audit(self) -> list[Violation]:
        return audit(self.pool, self.keys.__getitem__)


STATES = {
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float8 bounds": (torch.bfloat16, torch.float8_e4m3fn),
    "centred": (torch.bfloat16, torch.float8_e4m3fn, True, True),
}


@pytest.fixture(params=STATES.values(), ids=STATES)
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sealed:
    monkeypatch.setattr(audit_module, "PAGES_PER_CHUNK", 2)
    return Sealed(*request.param)


def test_sealed_pages_pass_and_seal_marks_only_them(state: Sealed) -> None:
    assert state.audit() == []
    assert state.pool.sealed.nonzero().squeeze(1).tolist() == SEALED


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("page", SEALED)
def test_key_written_after_sealing_is_found(state: Sealed, page: int, layer: int) -> None:
    state.keys[layer][page, 7, 1, 3] = 100.0
    assert state.audit() == [Violation(page, layer, ("min_max", "codes", "scale_zero"))]


def test_key_that_moves_inside_the_ranges_changes_codes_only(state: Sealed) -> None:
    keys = state.keys[5]
    keys[3, 0, 1] = torch.tensor([-5.0, 5.0, 0, 0, 0, 0, 0, 0])  # sets its token's range
    keys[3, 1:3, 1, 2] = torch.tensor([-5.0, 5.0])  # set its channel's range
    state.pool.seal(torch.tensor([3]), state.keys.__getitem__)
    assert state.audit() == []
    keys[3, 0, 1, 2] = 2.0
    assert state.audit() == [Violation(3, 5, ("codes",))]


@pytest.mark.parametrize("field", ["min_max", "codes", "scale_zero"])
def test_damaged_summary_is_named(state: Sealed, field: str) -> None:
    row = LAYERS.index(5)
    damaged = getattr(state.pool, field)[row, 4]
    damaged.view(torch.uint8).view(-1)[3] += 1
    assert state.audit() == [Violation(4, 5, (field,))]


def test_float8_bounds_stop_at_448_and_the_audit_knows() -> None:
    state = Sealed(torch.bfloat16, torch.float8_e4m3fn)
    state.keys[2][3, 7, 1, 3] = 1000.0
    assert state.audit() == [Violation(3, 2, FIELDS)]
    state.pool.seal(torch.tensor([3]), state.keys.__getitem__)
    assert state.pool.min_max[0, 3, 1, 1, 3].item() == 448
    assert state.audit() == []
    state.keys[2][3, 7, 1, 3] = 2000.0
    assert state.audit() == [Violation(3, 2, ("scale_zero",))]


@pytest.mark.parametrize("bounds", [None, torch.float8_e4m3fn], ids=["keys", "float8"])
def test_without_codes_only_bounds_are_kept_and_checked(bounds: torch.dtype | None) -> None:
    state = Sealed(torch.bfloat16, bounds, has_codes=False)
    assert state.pool.codes is None and state.pool.scale_zero is None
    assert state.pool.of_layer(5)[1:] == (None, None)
    assert state.audit() == []
    state.keys[5][4, 3, 1, 2] = 100.0
    assert state.audit() == [Violation(4, 5, ("min_max",))]
    kept = Sealed(torch.bfloat16, bounds).pool.min_max[:, SEALED].view(torch.uint8)
    state = Sealed(torch.bfloat16, bounds, has_codes=False)
    assert torch.equal(state.pool.min_max[:, SEALED].view(torch.uint8), kept)


def test_keys_that_are_no_numbers_are_no_violations(state: Sealed) -> None:
    for layer, keys in state.keys.items():
        keys[3, 2, 0, layer] = float("nan")
        keys[4, 2, 1] = float("inf")
        keys[6, :, 0, 1] = float("nan")
        keys[6, 0, 1, 0], keys[6, 1, 1, 0] = float("-inf"), -0.0
    state.pool.seal(torch.tensor([3, 4, 6]), state.keys.__getitem__)
    assert state.audit() == []


def test_every_violation_is_listed(state: Sealed) -> None:
    state.keys[2][7] += 1.0
    state.keys[5][1] += 1.0
    state.keys[5][6] += 1.0
    found = [(violation.layer_id, violation.page_id) for violation in state.audit()]
    assert found == [(2, 7), (5, 1), (5, 6)]


def test_pages_that_are_not_sealed_are_not_looked_at(state: Sealed) -> None:
    for keys in state.keys.values():
        keys[[0, 2, 5]] = float("nan")
    state.keys[2][6] += 1.0
    state.pool.unseal(torch.tensor([6, 6]))
    assert state.audit() == []


def test_nothing_sealed_nothing_found(state: Sealed) -> None:
    state.pool.unseal_all()
    state.keys[2] += 1.0
    assert state.audit() == []
    assert not state.pool.sealed.any()
