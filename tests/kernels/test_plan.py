"""The plan kernel against its reference and against the sealing rules."""

import pytest
import torch

from twilight_sgl.kernels.plan.reference import plan_rows
from twilight_sgl.kernels.plan.triton import StepPlanner
from twilight_sgl.pages.sealing import pages_needed

PS = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (request slot, tokens) of each row; slot 0 is padding
BATCHES = {
    "one token": [(1, 1)],
    "page edges": [(1, PS - 1), (2, PS), (3, PS + 1), (4, 2 * PS), (5, 2 * PS + 1)],
    "padding between": [(3, 70), (0, 1), (1, 33), (0, 5)],
    "shared prefix": [(6, 100), (7, 100), (8, 97)],
    "longer than a block": [(1, 40 * PS + 3), (2, 17)],
    "only padding": [(0, 9), (0, 1)],
}
SLOTS, PAGES, COLUMNS = 10, 200, 48


def table() -> torch.Tensor:
    """Slots 6 to 8 share their first four pages; the other pages are a request's own."""
    generator = torch.Generator().manual_seed(3)
    pages = torch.zeros(SLOTS, COLUMNS, dtype=torch.int64)
    for slot in range(1, SLOTS):
        pages[slot] = torch.randperm(PAGES - 1, generator=generator)[:COLUMNS] + 1
    pages[7, :4] = pages[8, :4] = pages[6, :4]
    offset = torch.arange(PS)
    return (pages.unsqueeze(-1) * PS + offset).flatten(1).int().to(DEVICE)


@pytest.mark.parametrize("min_context", [0, 33], ids=["all sparse", "short rows dense"])
@pytest.mark.parametrize("name", BATCHES)
def test_plan_and_claim(name: str, min_context: int) -> None:
    rows = BATCHES[name]
    slots = torch.tensor([slot for slot, _ in rows], device=DEVICE)
    seq_lens = torch.tensor([tokens for _, tokens in rows], device=DEVICE)
    p_of_slot = torch.full((SLOTS,), 0.9, device=DEVICE)
    p_of_slot[2], p_of_slot[3] = float("inf"), 1.0
    first_step = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    first_step[4] = False
    sealed = torch.zeros(PAGES, dtype=torch.int32, device=DEVICE)
    req_to_token = table()
    sealed[req_to_token[1, PS] // PS] = 1  # the second page of slot 1 is sealed already

    batch = len(rows)
    page_ids = torch.full((batch + 1, COLUMNS), -7, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((batch + 1,), -7, dtype=torch.int32, device=DEVICE)
    p = torch.full((batch + 1,), -7.0, device=DEVICE)
    sparse = torch.zeros(batch + 1, dtype=torch.bool, device=DEVICE)
    claimed = torch.full((PAGES,), -7, dtype=torch.int32, device=DEVICE)
    num_claimed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    totals = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    pages_reused = torch.full((batch + 1,), -7, dtype=torch.int32, device=DEVICE)
    turn = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    expected = plan_rows(
        req_to_token, slots, seq_lens, p_of_slot, page_size=PS, min_context_tokens=min_context
    )
    needed = pages_needed(expected[0], expected[1], expected[3], first_step[slots], sealed, PS)
    after_sealed = sealed.clone()
    after_sealed[needed.to_seal.long()] = 1
    after_first = first_step.clone()
    after_first[slots[expected[3]]] = False

    planner = StepPlanner(
        p_of_slot,
        first_step,
        sealed,
        page_ids,
        lengths,
        p,
        sparse,
        claimed,
        num_claimed,
        totals,
        pages_reused,
        turn,
        page_size=PS,
    )
    planner(req_to_token, slots, seq_lens, min_context_tokens=min_context, this_turn=3)
    assert turn.item() == 3
    assert lengths[:batch].tolist() == expected[1].tolist()
    assert p[:batch].tolist() == expected[2].tolist()
    assert sparse[:batch].tolist() == expected[3].tolist()
    for row, tokens in enumerate(expected[1].tolist()):
        pages = -(-tokens // PS)
        assert page_ids[row, :pages].tolist() == expected[0][row, :pages].tolist()
        assert (page_ids[row, pages:] == -7).all()
    assert page_ids[batch].eq(-7).all() and lengths[batch] == -7
    count = int(num_claimed)
    assert sorted(claimed[:count].tolist()) == sorted(needed.to_seal.tolist())
    assert (claimed[count:] == -7).all()
    assert torch.equal(sealed, after_sealed)
    assert torch.equal(first_step, after_first)
    assert int(totals[0]) == count
    # rows that are not new claim for themselves; here none of those shares a page with a new one
    assert int(totals[1]) == needed.reused
    # of rows that share an unsealed page, any may claim it
    by_row = pages_reused[:batch].tolist()
    assert sum(by_row) == needed.reused and pages_reused[batch] == -7
    if name != "shared prefix":
        assert by_row == needed.reused_by_row.tolist()


def test_later_steps_may_be_of_other_sizes() -> None:
    """On a GPU the kernel compiled for the first step runs all of them."""
    req_to_token = table()
    batch, limits = 4, {"dtype": torch.int32, "device": DEVICE}
    page_ids, lengths = torch.zeros((batch, COLUMNS), **limits), torch.zeros(batch, **limits)
    p = torch.zeros(batch, device=DEVICE)
    sparse = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
    turn = torch.zeros(1, **limits)
    p_of_slot = torch.full((SLOTS,), 0.9, device=DEVICE)
    planner = StepPlanner(
        p_of_slot,
        torch.ones(SLOTS, dtype=torch.bool, device=DEVICE),
        torch.zeros(PAGES, **limits),
        page_ids,
        lengths,
        p,
        sparse,
        torch.zeros(PAGES, **limits),
        torch.zeros(1, **limits),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
        torch.zeros(batch, **limits),
        turn,
        page_size=PS,
    )
    slots = torch.tensor([9, 1, 2, 3, 0], device=DEVICE)
    seq_lens = torch.tensor([9, 40, 2 * PS, 5 * PS + 1, 7], device=DEVICE)
    for step, (first, last, least) in enumerate([(0, 4, 16), (1, 2, 1), (1, 5, 2**31 - 1)]):
        rows = slice(first, last)  # the later ones lie unaligned
        planner(req_to_token, slots[rows], seq_lens[rows], min_context_tokens=least, this_turn=step)
        expected = plan_rows(
            req_to_token,
            slots[rows],
            seq_lens[rows],
            p_of_slot,
            page_size=PS,
            min_context_tokens=least,
        )
        count = last - first
        assert turn.item() == step
        assert lengths[:count].tolist() == expected[1].tolist()
        assert sparse[:count].tolist() == expected[3].tolist()
        for row, tokens in enumerate(expected[1].tolist()):
            pages = -(-tokens // PS)
            assert page_ids[row, :pages].tolist() == expected[0][row, :pages].tolist()
