"""The count kernel against its reference."""

from typing import Any

import pytest
import torch

from twilight_sgl.kernels.count import reference
from twilight_sgl.kernels.count.triton import IDLE_CLOCK, count_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXTRA_ROWS = 3  # behind the batch, as a larger batch's buffers have


def step(layers: int, batch: int, heads_kv: int, group: int) -> dict[str, torch.Tensor]:
    """A step's inputs; what no row of the batch wrote is poison."""
    rng = torch.Generator().manual_seed(layers * batch)
    shape = (layers, batch + EXTRA_ROWS, heads_kv)
    inputs = {
        "candidate_tokens": torch.randint(0, 2**30, shape, generator=rng, dtype=torch.int32),
        "kept_tokens": torch.randint(0, 900, shape, generator=rng, dtype=torch.int32),
        "masses": torch.rand((*shape[:2], heads_kv * group), generator=rng),
        "lengths": torch.randint(1, 40000, (batch,), generator=rng, dtype=torch.int32),
        "sparse": torch.arange(batch) % 3 != 1,
        "pages_reused": torch.randint(0, 99, (batch + 1,), generator=rng, dtype=torch.int32),
    }
    inputs["masses"][:, batch:] = torch.nan
    inputs["masses"][:, :batch][:, ~inputs["sparse"]] = torch.nan
    inputs["masses"][-1, 0, 0] = torch.nan  # of a row whose logits were not finite
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def totals(layers: int, batch: int, heads_kv: int) -> dict[str, torch.Tensor]:
    """Totals that earlier steps left."""
    made = {
        "tokens": torch.arange(layers * heads_kv * 3).view(layers, heads_kv, 3),
        "kept_mass": torch.full((layers, heads_kv), 0.25, dtype=torch.float64),
        "sparse_rows": torch.tensor([7]),
        "row_sums": torch.full((batch + EXTRA_ROWS, 5), -1.0, dtype=torch.float64),
    }
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def count(inputs: dict[str, Any], sums: dict[str, torch.Tensor], **timing: torch.Tensor) -> None:
    """Count by the kernel in a turn of three; it writes row sums to no other's place."""
    turns = sums["row_sums"].new_full((3, *sums["row_sums"].shape), -1.0)
    turn = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    count_step(**inputs, **(sums | {"row_sums": turns}), turn=turn, **timing)
    assert turns[::2].eq(-1).all()
    sums["row_sums"].copy_(turns[1])


@pytest.mark.parametrize(
    "layers, batch, heads_kv, group",
    [(1, 1, 1, 1), (3, 5, 2, 7), (22, 70, 8, 4), (70, 2, 3, 3), (2, 9, 32, 1)],
)
def test_adds_what_the_reference_adds(layers: int, batch: int, heads_kv: int, group: int) -> None:
    inputs = step(layers, batch, heads_kv, group)
    found, expected = (totals(layers, batch, heads_kv) for _ in range(2))
    for _ in range(2):
        count(inputs, found)
        reference.count_step(**inputs, **expected)
    assert torch.equal(found["tokens"], expected["tokens"])
    assert torch.equal(found["sparse_rows"], expected["sparse_rows"])
    counts = [column for column, name in enumerate(reference.ROW_SUMS) if name != "mass"]
    assert torch.equal(found["row_sums"][:, counts], expected["row_sums"][:, counts])
    torch.testing.assert_close(found["row_sums"], expected["row_sums"], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["kept_mass"], expected["kept_mass"], rtol=1e-12, atol=0)
    assert expected["kept_mass"].isfinite().all() and expected["row_sums"].isfinite().all()


def test_the_reference_counts_sparse_rows() -> None:
    inputs, sums = step(2, 4, 3, 2), totals(2, 4, 3)
    shares = inputs["masses"].nan_to_num(0.0)
    reference.count_step(**inputs, **sums)
    rows = (0, 2, 3)
    for layer in range(2):
        for head in range(3):
            start = 3 * (3 * layer + head)
            assert sums["tokens"][layer, head].tolist() == [
                start + sum(int(inputs["lengths"][row]) for row in rows),
                start + 1 + sum(int(inputs["candidate_tokens"][layer, row, head]) for row in rows),
                start + 2 + sum(int(inputs["kept_tokens"][layer, row, head]) for row in rows),
            ]
            masses = [float(shares[layer, row, 2 * head + g]) for row in rows for g in (0, 1)]
            assert float(sums["kept_mass"][layer, head]) == pytest.approx(0.25 + sum(masses) / 2)
    assert sums["sparse_rows"].item() == 10
    assert sums["row_sums"][1].tolist() == [0.0] * 5
    assert sums["row_sums"][4:].eq(-1).all()
    context, _, kept, mass, reused = sums["row_sums"][2].tolist()
    assert context == 6 * int(inputs["lengths"][2])
    assert kept == int(inputs["kept_tokens"][:, 2].sum())
    assert mass == pytest.approx(float(inputs["masses"][:, 2].double().sum()) / 2)
    assert reused == int(inputs["pages_reused"][2])


@pytest.mark.parametrize(
    ("began_and_ended", "added"), [((100, 350), 250), (IDLE_CLOCK, 0)], ids=["sealed", "idle"]
)
def test_adds_the_time_of_sealing(began_and_ended: tuple[int, int], added: int) -> None:
    timing: dict[str, Any] = {
        "clock": torch.tensor(began_and_ended, device=DEVICE),
        "nanoseconds": torch.tensor([5], device=DEVICE),
    }
    count(step(2, 3, 2, 2), totals(2, 3, 2), **timing)
    assert timing["nanoseconds"].item() == 5 + added
    assert timing["clock"].tolist() == list(IDLE_CLOCK)
