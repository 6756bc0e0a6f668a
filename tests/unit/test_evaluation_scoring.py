"""Scores and their intervals."""

import pytest

from twilight_sgl.evaluation.scoring import agreeing_tokens, mean, recall


@pytest.mark.parametrize(
    ("output", "references", "score"),
    [
        (" 1234567.", ["1234567"], 1.0),
        (" 1234568.", ["1234567"], 0.0),
        ("ABCDE, fghij and so on", ["abcde", "FGHIJ", "KLMNO", "PQRST"], 0.5),
        ("", ["word"], 0.0),
    ],
)
def test_recall_is_the_share_of_references_in_the_output(
    output: str, references: list[str], score: float
) -> None:
    assert recall(output, references) == score


def test_wilson_interval_of_passes_and_failures() -> None:
    # Published example: 81 of 263 gives 0.2553 to 0.3662 (Newcombe, Stat. Med. 17, 1998, method 3).
    got = mean([1.0] * 81 + [0.0] * 182)
    assert got.value == pytest.approx(81 / 263)
    assert (got.low, got.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert got.samples == 263


def test_all_passed_is_not_certain() -> None:
    got = mean([1.0] * 50)
    assert (got.value, got.high) == (1.0, 1.0)
    assert got.low == pytest.approx(50 / (50 + 1.959964**2))


@pytest.mark.parametrize("count", range(1, 60))
def test_an_interval_is_within_0_and_1(count: int) -> None:
    none, all_passed = mean([0.0] * count), mean([1.0] * count)
    assert str(none.low) == "0.0" and str(all_passed.high) == "1.0"  # nor is it -0.0


def test_bootstrap_interval_is_that_of_the_normal_distribution_and_repeats() -> None:
    scores = [0.0, 0.25, 0.5, 0.75, 1.0] * 40
    got = mean(scores)
    error = (0.125 / 200) ** 0.5  # the scores' variance is 1/8
    assert got.value == 0.5
    assert (got.low, got.high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=0.01)
    assert mean(scores) == got


@pytest.mark.parametrize(
    ("output", "other", "tokens"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2], [1, 2, 3], 2), ([4, 2], [1, 2], 0), ([], [1], 0)],
)
def test_agreement_ends_where_outputs_differ(
    output: list[int], other: list[int], tokens: int
) -> None:
    assert agreeing_tokens(output, other) == agreeing_tokens(other, output) == tokens
