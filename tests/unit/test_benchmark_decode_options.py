"""The decode benchmark's choices: backends, flags of servers, loads, and what is refused."""

from argparse import Namespace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from twilight_sgl.benchmark.decode import Benchmark
from twilight_sgl.benchmark.decode_options import (
    check_first_tokens,
    check_loads,
    check_radix_cache,
    check_server,
    choose_backends,
    parse_urls,
)
from twilight_sgl.benchmark.prompts import Load, parse_loads
from twilight_sgl.benchmark.servers import Server, fit_at_once, pool_tokens, server_flags
from twilight_sgl.errors import TwilightError

LOAD = Load("2x1k", 2, 1024)


def test_backends() -> None:
    assert choose_backends(None, {}, "cuda") == ["fa3", "quest", "twilight"]
    assert choose_backends(None, {}, "cpu") == ["torch_native", "quest", "twilight"]
    assert choose_backends(None, {"a": "", "b": ""}, "cpu") == ["a", "b"]
    assert choose_backends("triton, twilight", {"twilight": ""}, "cpu") == ["triton", "twilight"]
    for wrong in ("", "fa3,fa3"):
        with pytest.raises(TwilightError, match="--backends"):
            choose_backends(wrong, {}, "cpu")
    with pytest.raises(TwilightError, match="--urls names dense"):
        choose_backends("twilight", {"dense": ""}, "cpu")


def test_urls() -> None:
    assert parse_urls(["a=http://h:1/", "b=https://h"]) == {"a": "http://h:1", "b": "https://h"}
    for wrong in ("http://h:1", "=http://h", "a=h:1"):
        with pytest.raises(TwilightError, match="--urls"):
            parse_urls([wrong])


def test_flags_of_each_backend() -> None:
    def flags(name: str, device: str = "cuda") -> str:
        return " ".join(
            server_flags(
                name,
                model="m",
                p=0.9,
                dense="fa3",
                device=device,
                loads=parse_loads("1x28k,64x1k"),
                max_total_tokens=4096,
                extra=["--page-size", "32"],
            )
        )

    common = "--model-path m --sleep-on-idle "
    assert flags("fa3").startswith(
        f"{common}--attention-backend fa3 --decode-attention-backend fa3 "
    )
    for name, pruner in (("twilight", "top_p"), ("quest", "none --twilight-selector quest")):
        assert flags(name).startswith(
            f"{common}--page-size 16 --decode-attention-backend twilight --twilight-p 0.9 "
            f"--twilight-pruner {pruner} --attention-backend fa3 --cuda-graph-max-bs-decode 64 "
        )
    assert flags("quest").endswith("--max-total-tokens 4096 --page-size 32")
    assert "graph" not in flags("quest", "cpu")


def test_servers_fit_if_pools_and_weights_do(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=896,
        num_hidden_layers=24,
        num_key_value_heads=2,
        num_attention_heads=14,
        head_dim=64,
    )
    tokens = pool_tokens(parse_loads("32x28k,1x4k"), 1024)
    assert 32 * (28672 + 1024) < tokens < 1.02 * 32 * (28672 + 1024)
    assert tokens % 16 == 0
    (tmp_path / "model.safetensors").write_bytes(b"")
    pools = [(name, tokens) for name in ("fa3", "quest", "twilight")]
    assert not fit_at_once(pools, tmp_path, config, "cuda", 80 << 30)  # no weights there
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    # 12 KiB of cache a token each, and 2.4 KiB of summaries in two: 11.6 and 13.9 GiB
    assert fit_at_once(pools, tmp_path, config, "cuda", 60 << 30)
    assert not fit_at_once(pools, tmp_path, config, "cuda", 50 << 30)
    assert fit_at_once(pools[:1], tmp_path, config, "cuda", 20 << 30)


def test_a_shared_prefix_is_held_once() -> None:
    load = Load("64x28k", 64, 28672)
    tokens = pool_tokens([load], 256, 27648)
    assert 27648 + 64 * (1024 + 256) < tokens < 2 * 27648 + 64 * (1024 + 256) + 64 * 32 + 4096 + 16
    server = Server("a", "http://h:1")
    check_server(server, {"max_total_num_tokens": tokens}, [load], 256, 27648)
    with pytest.raises(TwilightError, match=rf"64x28k takes {64 * 28928} KV tokens, .*{tokens}"):
        check_server(server, {"max_total_num_tokens": tokens}, [load], 256, 0)
    info = {"max_total_num_tokens": tokens, "disable_radix_cache": True}
    with pytest.raises(TwilightError, match=r"--shared-prefix 27648 .*--disable-radix-cache"):
        check_server(server, info, [load], 256, 27648)
    check_radix_cache(0, disabled=True)


def test_loads_beyond_the_context_are_refused() -> None:
    check_loads([LOAD], 256, 1023, 1024 + 257)
    with pytest.raises(TwilightError, match=r"--loads 2x1k: 1024 \+ 256 .*context of 1280"):
        check_loads([LOAD], 256, 0, 1280)
    with pytest.raises(TwilightError, match=r"--shared-prefix 1024"):
        check_loads([LOAD], 256, 1024, 9999)


def test_many_requests_have_time_to_start() -> None:
    def most(requests: int, output_tokens: int) -> int:
        args = Namespace(output_tokens=output_tokens)
        load = Load("", requests, 28672)
        return Benchmark(args, {}, 32768).most_tokens(load)

    assert most(128, 64) == 64 + 4 * 128
    assert most(128, 256) == most(1, 256) == 1024
    assert most(1, 2048) == 32768 - 28672 - 1


def test_first_tokens_are_at_least_one() -> None:
    check_first_tokens(1)
    with pytest.raises(TwilightError, match=r"--first-tokens 0: pass 1"):
        check_first_tokens(0)
