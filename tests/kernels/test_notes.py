"""The notes kernel against its reference."""

import pytest
import torch

from twilight_sgl.kernels.notes import reference
from twilight_sgl.kernels.notes import triton as notes_kernel
from twilight_sgl.kernels.notes.triton import _BLOCK, NotesApplier, _Sheet

PS = 16
PAGES, SLOTS = 4000, 2 * _BLOCK
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def values(*numbers: int, dtype: torch.dtype = torch.int64, device: str = DEVICE) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


# released pages, written KV slots, p by request slot
NOTES = {
    "one page": ([values(7)], [], {}),
    "one request": ([], [], {3: 0.25}),
    "written tokens": ([], [torch.arange(5 * PS - 1, 9 * PS + 1, device=DEVICE)], {}),
    "page edges": ([], [values(PS - 1, PS, 2 * PS - 1, 4 * PS)], {}),
    "several with repeats": (
        [values(9, 9, 1), values(1), values(PAGES - 1)],
        [values(9 * PS, 30 * PS + 3), values(30 * PS)],
        {1: 0.95, 2: 1.0, SLOTS - 1: float("inf"), 9: 0.1},
    ),
    "more than a block": (
        [torch.arange(3, 3 + 2 * _BLOCK + 5, device=DEVICE)],
        [torch.arange(_BLOCK + 1, device=DEVICE) + PAGES // 2 * PS],
        {slot: 1 / slot for slot in range(1, _BLOCK + 2)},
    ),
    "int32, strided and of the host": (
        [values(5, 6, dtype=torch.int32), values(8, 80, 9, 90)[::2]],
        [values(PS * 40, device="cpu"), values(PS * 41, dtype=torch.int32, device="cpu")],
        {4: 0.5},
    ),
    "empty": ([values()], [values()], {}),
    "no pages": ([values(0, -1, PAGES, 6)], [values(-1, -PS - 1, PAGES * PS, 3)], {}),
}


def state() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Most pages sealed, most requests past their first step."""
    sealed = (torch.arange(PAGES, device=DEVICE) % 5 > 0).int()
    first_step = torch.arange(SLOTS, device=DEVICE) % 3 == 0
    return sealed, torch.full((SLOTS,), 0.75, device=DEVICE), first_step


@pytest.mark.parametrize("name", NOTES)
def test_equals_the_reference(name: str) -> None:
    found, expected = state(), state()
    reference.apply_notes(*NOTES[name], *expected, page_size=PS)
    NotesApplier(*found, page_size=PS)(*NOTES[name])
    for result, wanted in zip(found, expected, strict=True):
        assert result.equal(wanted)


def test_the_reference_ends_seals_and_begins_requests() -> None:
    sealed, p, first_step = state()
    notes = [values(1)], [values(2 * PS + 3, 3 * PS)], {4: 0.5}
    reference.apply_notes(*notes, sealed, p, first_step, page_size=PS)
    assert sealed[:7].tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert p[3:6].tolist() == [0.75, 0.5, 0.75]
    assert first_step[3:7].tolist() == [True, True, False, True]


def test_later_calls_may_be_of_other_sizes() -> None:
    """On a GPU the kernel compiled for the first call runs all of them."""
    found, expected = state(), state()
    apply_notes = NotesApplier(*found, page_size=PS)
    for notes in NOTES.values():
        apply_notes(*notes)
        reference.apply_notes(*notes, *expected, page_size=PS)
        for result, wanted in zip(found, expected, strict=True):
            assert result.equal(wanted)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is but one stream")
@pytest.mark.parametrize("step", [1, 2], ids=["as they are", "copied first"])
def test_what_was_noted_is_kept_until_it_is_read(step: int) -> None:
    sealed, p, first_step = state()
    apply_notes = NotesApplier(sealed, p, first_step, page_size=PS)
    first, second = values(*range(2, 100)), values(*range(102, 200))
    reader = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(reader):
        torch.cuda._sleep(1_000_000_000)
        apply_notes([first[::step]], [], {3: 0.25})
        apply_notes([second[::step]], [], {4: 0.5})
    assert not apply_notes._sent[-2].is_read(), "nothing was to be waited for"
    del first, second
    others = [torch.zeros(98, dtype=torch.int64, device=DEVICE) for _ in range(100)]
    torch.cuda.synchronize()
    assert not sealed[2:100:step].any() and not sealed[102:200:step].any()
    assert sealed[201:205].all()
    assert p[3:5].tolist() == [0.25, 0.5] and len(others) == 100


def test_a_sheet_that_may_not_be_read_yet_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_notes = NotesApplier(*state(), page_size=PS)
    apply_notes._sent.clear()
    monkeypatch.setattr(_Sheet, "is_read", lambda sheet: False)
    notes = [values(7)], [values(9 * PS)], {3: 0.25}
    for _ in range(6):
        apply_notes(*notes)
    assert len({sheet.notes.data_ptr() for sheet in apply_notes._sent}) == 6
    assert all(sheet.tensors for sheet in apply_notes._sent)


@pytest.mark.parametrize("numbers", [4096, 512], ids=["with room", "too small for some"])
def test_sheets_are_used_again(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes_kernel, "_NUMBERS", numbers)
    apply_notes = NotesApplier(*state(), page_size=PS)
    made: list[int] = []

    class Counted(_Sheet):
        def __init__(self, capacity: int, is_pinned: bool) -> None:
            super().__init__(capacity, is_pinned)
            made.append(capacity)

    monkeypatch.setattr(notes_kernel, "_Sheet", Counted)
    for requests in (1, 2000, 3, 2000, 5):
        apply_notes([values(200)], [], dict.fromkeys(range(1, requests + 1), 0.5))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    assert made == ([2048] if numbers < 2000 else [])
