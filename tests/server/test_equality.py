"""With everything kept, Twilight decodes what dense SGLang decodes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from client import Server, prose

pytestmark = pytest.mark.server

TOKENS = 6
# characters of prompt; about 3.5 to a token, so up to 4k tokens
LENGTHS = (20, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1000, 1300, 1600, 2000, 2500, 3000)
LENGTHS += (4000, 7000, 13500)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [prose(length, start=7000 * index) for index, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def dense(small_server: Server, prompts: list[str]) -> list[list[int]]:
    """What SGLang's `torch_native` decodes: rows that are not sparse go to it unchanged."""
    return [
        small_server.generate(prompt, TOKENS, {"enabled": False})["output_ids"]
        for prompt in prompts
    ]


def test_p_one_over_all_pages_equals_dense(
    small_server: Server, prompts: list[str], dense: list[list[int]]
) -> None:
    before = small_server.twilight()["budget"]
    kept = [small_server.generate(prompt, TOKENS, {"p": 1.0})["output_ids"] for prompt in prompts]
    after = small_server.twilight()["budget"]
    assert kept == dense
    context = after["context_tokens"] - before["context_tokens"]
    assert context > 0, "no step was sparse"
    assert after["candidate_tokens"] - before["candidate_tokens"] == context
    assert after["kept_tokens"] - before["kept_tokens"] == context


def test_dense_requests_are_not_counted(small_server: Server, dense: list[list[int]]) -> None:
    before = small_server.twilight()["budget"]
    small_server.generate(prose(200), TOKENS, {"enabled": False})
    assert small_server.twilight()["budget"] == before


def test_p_095_prunes(
    small_server: Server,
    prompts: list[str],
    dense: list[list[int]],
    record_property: Callable[[str, object], None],
) -> None:
    before = small_server.twilight()["budget"]
    pruned = [small_server.generate(prompt, TOKENS)["output_ids"] for prompt in prompts]
    after = small_server.twilight()["budget"]
    differing = sum(
        a != b
        for one, two in zip(pruned, dense, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    context = after["context_tokens"] - before["context_tokens"]
    kept = after["kept_tokens"] - before["kept_tokens"]
    report = f"{differing} of {TOKENS * len(prompts)} tokens differ, {kept / context:.1%} kept"
    record_property("p = 0.95", report)
    print(f"\np = 0.95 over all pages, {len(prompts)} prompts: {report}")
    assert kept < context


def test_mixed_batch_keeps_each_request_p(small_server: Server) -> None:
    """A dense, a p = 1 and a pruned request in one batch each decode as they do alone."""
    prompt = prose(3000, start=50000)
    asked = [{"enabled": False}, {"p": 1.0}, {"p": 0.3}, {"p": 0.05}]
    alone = [small_server.generate(prompt, 24, options)["output_ids"] for options in asked]
    assert alone[0] == alone[1]
    assert alone[0] != alone[3], "a tiny p changed nothing, so this prompt shows nothing"
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(
            pool.map(lambda o: small_server.generate(prompt, 24, o)["output_ids"], asked)
        )
    assert together == alone
