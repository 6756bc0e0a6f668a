"""What the soak sends."""

from collections import Counter
from typing import Any

import pytest

from twilight_sgl.benchmark.soak_load import ROUND, Item, Plan, Sizes
from twilight_sgl.errors import TwilightError

SIZES = Sizes(
    pool_tokens=6144, page_tokens=16, long_tokens=1536, output_tokens=96, sparse_tokens=256
)
TEXT = list(range(100_000))


def test_the_same_seed_gives_the_same_load() -> None:
    one, again, other = (Plan(TEXT, SIZES, seed) for seed in (1, 1, 2))
    for number in range(3):
        assert one.round(number) == again.round(number) != other.round(number)
    assert one.round(0) != one.round(1)
    assert one.last(8) == again.last(8)


def test_each_round_holds_every_kind() -> None:
    plan = Plan(TEXT, SIZES, 0)
    assert Counter(item.kind for item in plan.round(0)) == ROUND
    without = Plan(TEXT, SIZES, 0, grammar=False)
    assert not any(turn.grammar for item in without.round(0) for turn in turns(item))


def turns(item: Item) -> list[Any]:
    return [turn for chain in item.chains for turn in chain]


@pytest.mark.parametrize(
    ("pool", "context", "given"),
    [(6144, 8192, None), (6144, 8192, 300), (2_000_000, 32768, None), (2_000_000, 131072, 100_000)],
)
def test_prompts_and_answers_fit_the_server(pool: int, context: int, given: int | None) -> None:
    config = {"min_context_tokens": 256, "page_size": 16}
    sizes = Sizes.fit(pool, context, config, prompt_tokens=given, output_tokens=None)
    plan = Plan(TEXT, sizes, 0)
    items = [item for number in range(5) for item in plan.round(number)]
    for item in [*items, plan.last(18)]:
        for chain in item.chains:
            asked = sum(len(turn.token_ids) + turn.max_tokens for turn in chain)
            assert 0 < asked < min(context, pool // 2)
            assert all(turn.min_tokens <= turn.max_tokens for turn in chain)
    for item in items:
        if item.kind in {"own p", "dense", "hang up", "abort", "cold"}:
            assert all(len(turn.token_ids) >= 256 for turn in turns(item))
        if item.kind == "burst":
            asked = sum(len(turn.token_ids) + turn.min_tokens for turn in turns(item))
            assert pool < asked < 2 * pool
    assert sum(len(turn.token_ids) for turn in turns(plan.last(18))) < pool


def test_branches_share_a_topic_and_then_differ() -> None:
    plan = Plan(TEXT, SIZES, 0)
    topics = set()
    for item in (item for number in range(4) for item in plan.round(number)):
        if item.kind != "conversation":
            continue
        firsts = [chain[0].token_ids for chain in item.chains]
        assert len({first[:768] for first in firsts}) == 1
        assert len({first[768] for first in firsts}) == len(firsts) >= 2
        topics.add(firsts[0][:768])
    assert len(topics) == 3


def test_options_of_requests() -> None:
    plan = Plan(TEXT, SIZES, 0)
    items = {item.kind: turns(item) for number in range(3) for item in plan.round(number)}
    (own,), (dense,), (constrained,) = items["own p"], items["dense"], items["grammar"]
    assert 0 < own.sampling()["custom_params"]["twilight"]["p"] <= 1
    assert dense.sampling()["custom_params"] == {"twilight": {"enabled": False}}
    assert {"regex", "json_schema"} & set(constrained.sampling())
    assert "custom_params" not in items["cold"][0].sampling()
    assert items["hang up"][0].cut.hangs_up
    assert not items["abort"][0].cut.hangs_up


def test_a_short_text_goes_round() -> None:
    items = Plan(list(range(100)), SIZES, 0).round(0)
    ids = next(item.chains[0][0].token_ids for item in items if item.kind == "cold")
    assert ids == tuple((ids[0] + n) % 100 for n in range(SIZES.long_tokens))


@pytest.mark.parametrize(
    ("prompt", "output", "complaint"),
    [
        (3000, 100, "--prompt-tokens 3000 and --output-tokens 100 do not fit.*3072"),
        (200, None, "--prompt-tokens 200 is too short.*--twilight-min-context-tokens"),
    ],
)
def test_sizes_that_do_not_fit(prompt: int, output: int | None, complaint: str) -> None:
    config = {"min_context_tokens": 256, "page_size": 16}
    with pytest.raises(TwilightError, match=complaint):
        Sizes.fit(6144, 8192, config, prompt_tokens=prompt, output_tokens=output)
