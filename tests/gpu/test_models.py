"""Every model family decodes with p = 1 as it decodes densely, on servers that start together."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
from models import FAMILIES, runnable, verdicts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def futures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[str]"]]:
    with verdicts(runnable(), tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.mark.parametrize("name", FAMILIES)
def test_family(futures: dict[str, "Future[str]"], name: str) -> None:
    if name not in futures:
        pytest.skip(f"needs {FAMILIES[name].gpus} GPUs")
    assert futures[name].result() == "ok"
