"""What the backend reads off a model runner."""

from types import SimpleNamespace

import pytest
import torch

from twilight_sgl.attention.backend import longest_context


@pytest.mark.parametrize(
    ("columns", "context_len", "longest"), [(32772, 32768, 32768), (64, 96, 64)]
)
def test_spare_columns_of_the_table_are_no_context(
    columns: int, context_len: int, longest: int
) -> None:
    table = torch.zeros((2, columns), dtype=torch.int32)
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        model_config=SimpleNamespace(context_len=context_len),
    )
    assert longest_context(runner) == longest
