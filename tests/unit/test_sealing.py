"""Which pages a step has to seal, and how many it finds sealed."""

import pytest
import torch

from twilight_sgl.pages.sealing import PagesNeeded, pages_needed

PS = 16
NUM_PAGES = 12


def needed(
    pages: list[list[int]],
    lengths: list[int],
    *,
    sealed: set[int] | None = None,
    first: list[bool] | None = None,
    sparse: list[bool] | None = None,
) -> PagesNeeded:
    columns = max(map(len, pages))
    page_ids = torch.tensor([row + [0] * (columns - len(row)) for row in pages], dtype=torch.int32)
    is_sealed = torch.zeros(NUM_PAGES, dtype=torch.int32)
    is_sealed[list(sealed or ())] = 1
    return pages_needed(
        page_ids,
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(sparse or [True] * len(pages)),
        torch.tensor(first or [True] * len(pages)),
        is_sealed,
        PS,
    )


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        pytest.param(1, [], id="one token"),
        pytest.param(PS - 1, [], id="PS-1"),
        pytest.param(PS, [], id="PS: this step fills the page"),
        pytest.param(PS + 1, [5], id="PS+1"),
        pytest.param(2 * PS, [5], id="2PS"),
        pytest.param(2 * PS + 1, [3, 5], id="2PS+1"),
    ],
)
def test_a_page_is_full_when_earlier_steps_filled_it(length: int, expected: list[int]) -> None:
    result = needed([[5, 3, 7]], [length])
    assert result.to_seal.tolist() == expected
    assert result.reused == 0


def test_sealed_pages_are_not_sealed_again_and_count_as_reused() -> None:
    result = needed([[5, 3, 7]], [2 * PS + 1], sealed={5})
    assert (result.to_seal.tolist(), result.reused) == ([3], 1)


def test_a_request_counts_reuse_in_its_first_step_only() -> None:
    result = needed([[5, 3, 7]], [2 * PS + 1], sealed={5}, first=[False])
    assert (result.to_seal.tolist(), result.reused) == ([3], 0)


def test_new_rows_that_share_a_prefix_build_it_once_and_reuse_it_else() -> None:
    pages = [[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 5, 6]]
    lengths = [2 * PS + 5, 3 * PS, 3 * PS + 1]
    result = needed(pages, lengths)
    assert result.to_seal.tolist() == [1, 2, 5]
    assert result.reused == 7 - 3  # three rows name seven full pages, of which three get built
    assert needed(pages, lengths, sealed={1, 2, 5}).reused == 7


def test_a_new_row_and_an_old_one_that_need_the_same_page() -> None:
    result = needed([[1, 2], [1, 3]], [PS + 1, PS + 2], first=[False, True])
    assert (result.to_seal.tolist(), result.reused) == ([1], 0)


def test_rows_that_are_not_sparse_seal_and_reuse_nothing() -> None:
    result = needed([[1, 2], [3, 4]], [PS + 1, PS + 1], sealed={1}, sparse=[False, True])
    assert (result.to_seal.tolist(), result.reused) == ([3], 0)


def test_padded_rows_never_name_page_0() -> None:
    result = needed([[0, 0], [3, 4], [0, 0]], [0, PS + 1, 0])
    assert (result.to_seal.tolist(), result.reused) == ([3], 0)


def test_a_step_of_padding_only() -> None:
    result = needed([[0]], [0])
    assert (result.to_seal.tolist(), result.reused) == ([], 0)
