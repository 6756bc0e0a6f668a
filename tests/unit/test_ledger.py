"""What the scheduler noted is applied once, and not before."""

import pytest
import torch

from twilight_sgl.pages.ledger import MOST_TENSORS, Ledger, RequestTable
from twilight_sgl.pages.pool import SummaryPool

NUM_PAGES = 6
SLOTS = 5
DEFAULT_P = 0.75


class State:
    def __init__(self) -> None:
        self.pool = SummaryPool(
            layer_ids=(0,),
            num_pages=NUM_PAGES,
            page_size=16,
            heads_kv=1,
            dim=4,
            dtype=torch.float32,
            device="cpu",
        )
        self.requests = RequestTable(SLOTS, DEFAULT_P, "cpu")
        self.ledger = Ledger(self.pool, self.requests)

    def seal(self, *pages: int) -> None:
        self.pool.seal(torch.tensor(pages), lambda layer: torch.zeros(NUM_PAGES, 16, 1, 4))

    @property
    def sealed(self) -> list[int]:
        return self.pool.sealed.nonzero().squeeze(1).tolist()


@pytest.fixture
def state() -> State:
    state = State()
    state.seal(1, 2, 3)
    return state


def test_nothing_happens_before_apply(state: State) -> None:
    state.ledger.pages_released(torch.tensor([1]))
    state.ledger.requests_admitted([(2, 0.5)])
    assert state.sealed == [1, 2, 3]
    assert state.requests.p.tolist() == [DEFAULT_P] * SLOTS
    assert not state.requests.first_step.any()


def test_released_pages_lose_their_seal_once(state: State) -> None:
    state.ledger.pages_released(torch.tensor([3, 1, 1]))
    state.ledger.apply()
    assert state.sealed == [2]
    state.seal(1)
    state.ledger.apply()
    assert state.sealed == [1, 2], "a release was applied twice"


def test_a_page_freed_during_the_step_that_seals_it_is_unsealed_after(state: State) -> None:
    state.ledger.pages_released(torch.tensor([4]))
    state.seal(4)
    state.ledger.apply()
    assert state.sealed == [1, 2, 3]


def test_a_page_freed_sealed_by_its_next_owner_and_freed_again(state: State) -> None:
    for _ in range(2):
        state.ledger.pages_released(torch.tensor([2]))
        state.ledger.apply()
        assert state.sealed == [1, 3]
        state.seal(2)
        assert state.sealed == [1, 2, 3]


def test_flush_clears_everything(state: State) -> None:
    state.ledger.all_pages_released()
    state.ledger.pages_released(torch.tensor([2]))
    state.ledger.apply()
    assert state.sealed == []
    state.seal(5)
    state.ledger.apply()
    assert state.sealed == [5]


def test_written_pages_lose_their_seal_with_released_ones(state: State) -> None:
    state.ledger.tokens_written(torch.tensor([16 * 3 + 15, 16 * 4, 0]))
    state.ledger.tokens_written(torch.tensor([16 * 3], dtype=torch.int32))
    state.ledger.pages_released(torch.tensor([1], dtype=torch.int32))
    assert state.sealed == [1, 2, 3]
    state.ledger.apply()
    assert state.sealed == [2]
    state.seal(3)
    state.ledger.apply()
    assert state.sealed == [2, 3], "what was written was applied twice"


def test_a_ledger_that_nobody_applies_is_long(state: State) -> None:
    for _ in range(MOST_TENSORS):
        assert not state.ledger.is_long
        state.ledger.tokens_written(torch.tensor([16]))
    assert state.ledger.is_long
    state.ledger.apply()
    assert not state.ledger.is_long


def test_no_pages_is_no_entry(state: State) -> None:
    state.ledger.pages_released(torch.tensor([], dtype=torch.long))
    state.ledger.apply()
    assert state.sealed == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_page_ids_of_either_type(state: State, dtype: torch.dtype) -> None:
    state.ledger.pages_released(torch.tensor([3], dtype=dtype))
    state.ledger.apply()
    assert state.sealed == [1, 2]


def test_admission_writes_p_and_begins_anew(state: State) -> None:
    state.ledger.requests_admitted([(2, 0.5), (4, RequestTable.DENSE)])
    state.ledger.apply()
    assert state.requests.p.tolist() == [DEFAULT_P, DEFAULT_P, 0.5, DEFAULT_P, float("inf")]
    assert state.requests.first_step.tolist() == [False, False, True, False, True]


def test_the_last_admission_of_a_slot_wins(state: State) -> None:
    state.ledger.requests_admitted([(2, 0.5), (3, 0.125)])
    state.ledger.pages_released(torch.tensor([1]))
    state.ledger.requests_admitted([(2, 0.25)])
    state.ledger.apply()
    assert state.requests.p[2:4].tolist() == [0.25, 0.125]
    assert state.sealed == [2, 3]


def test_admission_of_nobody(state: State) -> None:
    state.ledger.requests_admitted([])
    state.ledger.apply()
    assert state.requests.p.tolist() == [DEFAULT_P] * SLOTS
