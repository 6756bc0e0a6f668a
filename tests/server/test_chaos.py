"""The seal invariant on a live server: aborts, flushes, eviction and retraction."""

import contextlib
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from client import Server, prose

pytestmark = pytest.mark.server


def stream_and_hang_up(server: Server, text: str, events: int) -> None:
    """Read some events of a long stream, then close the connection, which aborts the request."""
    body = {"text": text, "stream": True, "sampling_params": {"max_new_tokens": 400}}
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        for _ in range(2 * events):
            response.readline()


def test_aborts(small_server: Server) -> None:
    before = small_server.twilight()
    prefix = prose(1500, start=300000)
    threads = [
        threading.Thread(target=stream_and_hang_up, args=(small_server, prefix + str(n), n + 1))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    small_server.post("/abort_request", {"rid": "", "abort_all": True})
    small_server.generate_all([prefix + str(n) for n in range(4)], 12)
    after = small_server.twilight()
    assert after["audit"]["checks"] > before["audit"]["checks"]
    assert after["audit"]["violations"] == 0


def test_flush_between_and_under_requests(small_server: Server) -> None:
    prefix = prose(2000, start=310000)
    worker = threading.Thread(
        target=small_server.generate_all, args=([prefix + str(n) for n in range(3)], 16)
    )
    worker.start()
    for _ in range(4):
        time.sleep(0.5)
        with contextlib.suppress(OSError):  # SGLang refuses a flush while requests run
            small_server.post("/flush_cache", {})
    worker.join()
    small_server.flush()
    small_server.generate(prefix, 8)
    assert small_server.twilight()["audit"]["violations"] == 0


def test_eviction_and_retraction(small_server: Server) -> None:
    """Seven requests start with 4368 tokens together, and grow past a cache of 4608."""
    small_server.flush()
    before = small_server.twilight()
    prompts = [[1000 * n + 7 * i % 997 for i in range(624)] for n in range(1, 8)]
    with ThreadPoolExecutor() as pool:
        # SGLang admits the last one only beside requests that decode: it reserves less for those.
        replies = pool.submit(small_server.generate_all, prompts[:-1], 40)
        while small_server.twilight()["steps"]["decode"] < before["steps"]["decode"] + 2:
            assert not replies.done()
            time.sleep(0.2)
        last = small_server.generate(prompts[-1], 40)
    replies = [*replies.result(), last]
    again = small_server.generate_all(prompts, 4)  # some of these prefixes were evicted
    after = small_server.twilight()
    assert all(r["meta_info"]["completion_tokens"] == 40 for r in replies)
    assert all(r["meta_info"]["completion_tokens"] == 4 for r in again)
    log = small_server.log.read_text()
    assert "Retract requests" in log, "the load did not make SGLang retract"
    assert after["pages"]["built"] - before["pages"]["built"] > after["pages"]["capacity"]
    assert after["audit"]["checks"] - before["audit"]["checks"] >= 3
    assert after["audit"]["violations"] == 0
    assert "Twilight audit" not in log
