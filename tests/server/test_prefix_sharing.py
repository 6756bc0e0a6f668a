"""Page summaries are built once for a prefix and reused by every request that shares it."""

import pytest
from client import Server, prose

pytestmark = pytest.mark.server

PAGE = 16


def test_eight_requests_share_a_prefix(server: Server) -> None:
    server.flush()
    before = server.twilight()["pages"]

    prefix = prose(17500, start=120000)
    suffixes = [f"\n\nQuestion {n}: what does section {n} say?\nAnswer:" for n in range(8)]
    first = server.generate(prefix + suffixes[0], 4)["meta_info"]
    after_first = server.twilight()["pages"]
    rest = server.generate_all([prefix + suffix for suffix in suffixes[1:]], 4)
    after = server.twilight()["pages"]

    prompt, shared = first["prompt_tokens"], [r["meta_info"]["cached_tokens"] for r in rest]
    assert prompt > 3900
    assert first["cached_tokens"] == 0
    assert all(prompt - 64 < cached < prompt for cached in shared), shared

    # the last decode step sees prompt + 3 tokens as earlier ones at most
    assert after_first["built"] - before["built"] in ((prompt + n) // PAGE for n in range(4))
    assert after_first["reused"] == before["reused"]
    prefix_pages = min(shared) // PAGE
    assert after["reused"] - before["reused"] == sum(cached // PAGE for cached in shared)
    assert after["reused"] - before["reused"] >= 7 * prefix_pages
    own_pages = (after["built"] - after_first["built"]) / 7
    assert own_pages <= 4, "the shared prefix was sealed again"
    assert server.twilight()["audit"]["violations"] == 0


def test_flush_unseals_everything(server: Server) -> None:
    server.generate(prose(3000, start=30000), 4)
    assert server.twilight()["pages"]["sealed"] > 0
    server.flush()
    server.generate("Hello", 2)  # its decode step applies what the flush noted
    assert server.twilight()["pages"]["sealed"] == 0


def test_budget_is_the_least_number_of_candidates(server: Server) -> None:
    """A quarter of this context would be fewer."""
    before = server.twilight()
    server.generate(prose(7000, start=200000), 16)
    after = server.twilight()
    each = len(after["heads"]["layer_ids"]) * len(after["heads"]["kept_fraction"][0])
    each *= after["steps"]["sparse_rows"] - before["steps"]["sparse_rows"]
    context, candidates, kept = (
        (after["budget"][key] - before["budget"][key]) / each
        for key in ("context_tokens", "candidate_tokens", "kept_tokens")
    )
    least = after["config"]["min_candidate_tokens"]
    assert context / 4 < least < context
    # whole pages are named, and the last one is not full
    assert least - 16 < candidates <= least
    assert 0 < kept < candidates / 2
