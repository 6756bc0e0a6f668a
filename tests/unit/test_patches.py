"""The contracts of the patches, what breaks them, and what the hooks do once installed."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry

from twilight_sgl import patches, plugin
from twilight_sgl.config import flag_of
from twilight_sgl.errors import TwilightError
from twilight_sgl.pages.pool import SummaryPool, summary_bytes_per_token
from twilight_sgl.patches import (
    MODULES,
    Patch,
    PatchError,
    all_patches,
    decode_slots,
    forward_order,
    install,
    mixed_steps,
    page_release,
    request_slots,
    sampling_params,
    server_info,
)
from twilight_sgl.request import RequestOptions


@pytest.fixture
def registry() -> Iterator[type]:
    """SGLang's hook registry, empty; what a test patched is restored after it."""
    HookRegistry.reset()
    originals = {}
    for patch in all_patches():
        owner, _, name = patch.target.rpartition(".")
        originals[patch.target] = (resolve_name(owner), name, vars(resolve_name(owner))[name])
    yield HookRegistry
    for owner, name, original in originals.values():
        hooked = vars(owner)[name]
        setattr(owner, name, original)
        if inspect.ismodule(owner):  # SGLang hooks a function under all of its names
            for module in list(sys.modules.values()):
                for other, value in list(getattr(module, "__dict__", {}).items()):
                    if value is hooked:
                        setattr(module, other, original)
    HookRegistry.reset()


class Fake:
    """What a patch can be aimed at."""

    def method(self, first: int, second: int = 0) -> int:
        return first


def fake_patch(target: str = "Fake.method", *parameters: str) -> Patch:
    def hook(*args: Any) -> None:
        """Change nothing."""

    return Patch(f"{__name__}.{target}", "before", hook, "to test", parameters or ("self",))


@pytest.mark.parametrize("module", MODULES)
def test_contract_holds(module: str) -> None:
    found = importlib.import_module(f"twilight_sgl.patches.{module}").PATCHES
    assert found or (module == "decode_slots" and not decode_slots.is_known())
    for patch in found:
        patch.check()
        assert patch.why
        assert patch.parameters


@pytest.mark.parametrize("module", MODULES)
def test_renamed_target_is_named(module: str) -> None:
    for patch in importlib.import_module(f"twilight_sgl.patches.{module}").PATCHES:
        renamed = replace(patch, target=f"{patch.target}_renamed")
        with pytest.raises(PatchError, match="is not in this SGLang") as caught:
            renamed.check()
        assert renamed.target in str(caught.value)


@pytest.mark.parametrize("module", MODULES)
def test_changed_signature_is_named(module: str) -> None:
    for patch in importlib.import_module(f"twilight_sgl.patches.{module}").PATCHES:
        changed = replace(patch, parameters=("renamed", *patch.parameters[1:]))
        with pytest.raises(PatchError, match="expects it to begin with") as caught:
            changed.check()
        assert patch.target in str(caught.value)
        assert "'renamed'" in str(caught.value)


@pytest.mark.parametrize(
    "parameters",
    [("first",), ("self", "second"), ("self", "first", "second", "third")],
    ids=["self missing", "one skipped", "one too many"],
)
def test_parameters_are_compared_in_order(parameters: tuple[str, ...]) -> None:
    fake_patch("Fake.method", "self", "first").check()
    with pytest.raises(PatchError, match=r"Fake\.method takes \['self', 'first', 'second'\]"):
        fake_patch("Fake.method", *parameters).check()


@pytest.mark.parametrize("target", ["no_such_module.function", f"{__name__}.Gone.method"])
def test_missing_module_or_class_is_named(target: str) -> None:
    with pytest.raises(PatchError, match=target.replace(".", r"\.")):
        replace(fake_patch(), target=target).check()


def test_nothing_is_installed_when_one_contract_is_broken(registry: type) -> None:
    with pytest.raises(PatchError, match=r"Fake\.gone"):
        install([fake_patch(), fake_patch("Fake.gone")])
    assert not registry._hooks
    assert Fake.method.__qualname__ == "Fake.method"
    assert not hasattr(Fake.method, "__wrapped__")


def test_a_target_that_somebody_patched_is_refused(registry: type) -> None:
    registry._patched.add(fake_patch().target)
    with pytest.raises(PatchError, match=r"another plugin has patched .*Fake\.method.*SGLANG_PLUG"):
        install([fake_patch()])


def test_a_hook_that_sglang_did_not_apply_is_named(
    registry: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "apply_hooks", lambda: None)
    with pytest.raises(PatchError, match=r"did not apply the hooks on .*Fake\.method"):
        install([fake_patch()])


def test_all_patches_are_installed_and_run(
    registry: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {patch.target: resolve_name(patch.target) for patch in all_patches()}
    install(all_patches())
    for target, original in before.items():
        assert target in registry._patched
        assert resolve_name(target) != original
    with pytest.raises(PatchError, match="has patched"):
        install(all_patches())

    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert flag_of("selector_budget") in parser.format_help()
    parsed = parser.parse_args(["--model-path", "m", "--twilight-p", "0.5"])
    assert parsed.twilight_p == "0.5"

    params = SamplingParams(custom_params={"twilight": {"p": 2}})
    params.normalize(None)
    with pytest.raises(TwilightError, match=r"twilight\.p must be"):
        params.verify(1000)
    params.custom_params = {"twilight": {"p": 0.5}}
    params.verify(1000)


# Each hook.


class FakeRuntime:
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.ledger = SimpleNamespace(
            is_long=False,
            apply=lambda: self.calls.append(("apply",)),
            tokens_written=lambda slots: self.calls.append(("written", slots.tolist())),
            pages_released=lambda pages: self.calls.append(("released", pages.tolist())),
            all_pages_released=lambda: self.calls.append(("all released",)),
        )

    def on_requests_admitted(self, slots: list[int], options: Any) -> None:
        self.calls.append(("admitted", slots, list(options)))

    def on_dense_step(self, context_tokens: Any, options: Any) -> None:
        self.calls.append(("dense", list(context_tokens), list(options)))

    def state(self) -> dict[str, int]:
        return {"pages": 1}


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.mark.parametrize("mode", list(ForwardMode), ids=lambda mode: mode.name)
def test_forward_notes_what_it_writes_and_applies_unless_it_extends(
    runtime: FakeRuntime, mode: ForwardMode
) -> None:
    hook = forward_order.PATCHES[0].hook
    batch = SimpleNamespace(forward_mode=mode, out_cache_loc=torch.tensor([16, 17]))
    hook(SimpleNamespace(twilight=runtime), batch)
    writes = [] if mode in (ForwardMode.DECODE, ForwardMode.IDLE) else [("written", [16, 17])]
    calls = writes if mode.is_extend_without_speculative() else [*writes, ("apply",)]
    assert runtime.calls == calls
    hook(SimpleNamespace(twilight=None), batch)
    hook(SimpleNamespace(), batch)
    assert runtime.calls == calls


def test_extends_apply_where_no_decode_step_does(runtime: FakeRuntime) -> None:
    runtime.ledger.is_long = True
    batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND, out_cache_loc=torch.tensor([16]))
    forward_order.PATCHES[0].hook(SimpleNamespace(twilight=runtime), batch)
    assert runtime.calls == [("written", [16]), ("apply",)]


def test_forward_without_slots(runtime: FakeRuntime) -> None:
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, out_cache_loc=None)
    forward_order.PATCHES[0].hook(SimpleNamespace(twilight=runtime), batch)
    assert runtime.calls == [("apply",)]


def test_released_pages_reach_the_ledger(runtime: FakeRuntime) -> None:
    released, cleared = (patch.hook for patch in page_release.PATCHES)
    ours, others = SimpleNamespace(twilight=runtime), SimpleNamespace()
    for allocator in (ours, others):
        released(allocator, torch.tensor([3, 4]), torch.tensor([9]))
        cleared(allocator)
    assert runtime.calls == [("released", [3, 4]), ("released", [9]), ("all released",)]


@pytest.mark.parametrize("hook", [patch.hook for patch in request_slots.PATCHES])
def test_admitted_requests_reach_the_runtime(runtime: FakeRuntime, hook: Callable) -> None:
    wishes = [None, {"twilight": {"p": 0.5}}, {"twilight": {"enabled": False}, "other": 1}]
    reqs = [SimpleNamespace(sampling_params=SimpleNamespace(custom_params=w)) for w in wishes]
    table = SimpleNamespace(twilight=runtime)
    hook([4, 2, 7], table, reqs)
    options = [RequestOptions(), RequestOptions(p=0.5), RequestOptions(enabled=False)]
    assert runtime.calls == [("admitted", [4, 2, 7], options)]
    hook(None, table, reqs)  # no slot was free
    hook([1], SimpleNamespace(), reqs)
    assert len(runtime.calls) == 1


def test_decode_rows_of_a_mixed_step_reach_the_runtime(runtime: FakeRuntime) -> None:
    def batch(wishes: list[Any], prefix_lens: list[int], table: Any) -> SimpleNamespace:
        reqs = [SimpleNamespace(sampling_params=SimpleNamespace(custom_params=w)) for w in wishes]
        return SimpleNamespace(reqs=reqs, prefix_lens=prefix_lens, req_to_token_pool=table)

    table = SimpleNamespace(twilight=runtime)
    off = {"twilight": {"enabled": False}}
    running = batch([None, off], [], table)
    hooks = {patch.target.rpartition(".")[2]: patch.hook for patch in mixed_steps.PATCHES}
    # After the merge, prefix_lens are those of the prefills, then of the running requests.
    mixed = batch([None, None, None, off], [0, 512, 99, 1000], table)
    hooks["mix_with_running"](None, mixed, running)
    dense = ("dense", [100, 1001], [RequestOptions(), RequestOptions(enabled=False)])
    assert runtime.calls == [dense]
    hooks["mix_with_running"](None, mixed, batch([], [], table))
    hooks["mix_with_running"](None, batch([None], [3], SimpleNamespace()), running)
    assert len(runtime.calls) == 1
    if "convert_decode_to_extend" in hooks:
        hooks["convert_decode_to_extend"](None, batch([None, off], [99, 1000], table))
        assert runtime.calls == [dense, dense]


def test_bad_wish_is_refused_with_the_sampling_parameters() -> None:
    hook = sampling_params.PATCHES[0].hook
    with pytest.raises(ValueError, match=r"custom_params\.twilight"):
        hook(None, SimpleNamespace(custom_params={"twilight": 1}), 1000)
    hook(None, SimpleNamespace(custom_params=None), 1000)


@pytest.mark.parametrize(
    ("wish", "message"),
    [({"twilight": {"p": 2}}, r"twilight.p must be"), ({"twilight": {"p": 1}}, ""), (None, "")],
)
def test_bad_wish_that_no_worker_checked_aborts_its_request(wish: Any, message: str) -> None:
    hook = sampling_params.PATCHES[1].hook
    errors: list[str] = []
    req = SimpleNamespace(
        sampling_params=SimpleNamespace(custom_params=wish), set_finish_with_abort=errors.append
    )
    hook(None, req, is_retracted=False)
    assert len(errors) == bool(message)
    assert all(message in error for error in errors)
    RequestOptions.from_custom_params(req.sampling_params.custom_params)  # admits it


def test_state_is_shown_in_server_info(runtime: FakeRuntime) -> None:
    hook = server_info.PATCHES[0].hook
    result = SimpleNamespace(internal_state={"a": 1})
    for attributes in ({}, {"twilight": None}):
        runner = SimpleNamespace(**attributes)
        hook(result, SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)))
    assert result.internal_state == {"a": 1}
    runner = SimpleNamespace(twilight=runtime)
    hook(result, SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)))
    assert result.internal_state == {"a": 1, "twilight": {"pages": 1}}


@pytest.mark.parametrize("key_bytes", [1, 2, 4])
def test_summary_bytes_are_what_the_pool_allocates(key_bytes: int) -> None:
    dtype = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}[key_bytes]
    shape = {"num_pages": 10, "page_size": 16, "heads_kv": 3, "dim": 64}
    pool = SummaryPool(layer_ids=(2, 3), dtype=dtype, device="cpu", **shape)
    per_token = summary_bytes_per_token(3, 64, key_bytes, 16)
    assert pool.nbytes - pool.sealed.nbytes == per_token * 2 * 10 * 16


# The plugin.


def test_installed_sglang_is_in_the_supported_range() -> None:
    from importlib.metadata import version

    assert plugin.check_sglang_version() == version("sglang")


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0"])
def test_other_sglang_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(TwilightError, match=rf"sglang {version} is outside .*pip install"):
        plugin.check_sglang_version()


def test_a_failed_plugin_refuses_servers_that_ask_for_it(
    registry: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    def broken() -> list[Patch]:
        return [fake_patch("Fake.gone")]

    monkeypatch.setattr(plugin, "_failure", None)
    monkeypatch.setattr(patches, "all_patches", broken)
    with pytest.raises(PatchError, match=r"Fake\.gone"):
        plugin.register()
    assert isinstance(plugin.failure(), PatchError)
    assert "twilight" not in ATTENTION_BACKENDS
    registry.apply_hooks()
    check = resolve_name("sglang.srt.server_args.ServerArgs.check_server_args")
    with pytest.raises(RuntimeError, match=r"Twilight plugin failed to load: .*Fake\.gone"):
        check(SimpleNamespace(decode_attention_backend="twilight"))
