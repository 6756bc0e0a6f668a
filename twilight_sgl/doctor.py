"""`python -m twilight_sgl.doctor`: is all here that Twilight needs, and what to do if not."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from twilight_sgl import config as twilight_config
from twilight_sgl.errors import TwilightError
from twilight_sgl.plugin import SUPPORTED_SGLANG, check_sglang_version

OK, WARN, FAIL = "ok", "warn", "FAIL"
SUPPORTED_PYTHON = ">=3.10,<3.14"
PLUGIN_NAME, PLATFORM_NAME = "twilight", "twilight_cpu"
ENTRY_POINTS = (("sglang.srt.plugins", PLUGIN_NAME), ("sglang.srt.platforms", PLATFORM_NAME))
INSTALL_SGLANG = f"pip install --force-reinstall 'sglang{SUPPORTED_SGLANG}'"
REINSTALL = "pip install -e . in the checkout, in this Python's environment"
Rows = Iterator["Check"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the report: `status` is ok, warn or FAIL; `remedy` is empty when it is ok."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 when any check fails, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m twilight_sgl.doctor",
        description="Check the environment, a configuration and a model before serving. Imports "
        "SGLang (about a minute), loads no weights. Exits with 1 when a check fails, else with 0.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--model-path", metavar="FOLDER", help="default: the embedded one")
    twilight_config.add_flags(parser)
    arguments = parser.parse_args(argv)
    rows = []
    for check in run_checks(arguments):
        rows.append(check)
        if not arguments.json:
            print(as_text(check), flush=True)
    failed, warned = (sum(row.status == status for row in rows) for status in (FAIL, WARN))
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [*map(dataclasses.asdict, rows)]}, indent=2))
    else:
        print(f"\n{len(rows)} checks: {failed} failed, {warned} with a warning")
    return 1 if failed else 0


def run_checks(arguments: argparse.Namespace) -> Rows:
    """Run every check in turn; one that raises is reported as failed, and the rest still run."""
    for name, check, remedy in CHECKS:
        rows = check(arguments)
        while row := _next_row(rows, name, remedy):
            yield row


def _next_row(rows: Rows, name: str, remedy: str) -> Check | None:
    noise = io.StringIO()  # what SGLang prints, logs and warns about when it is imported
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            return next(rows, None)
    except Exception as error:
        text = str(error) if isinstance(error, TwilightError) else repr(error)
        return Check(name, FAIL, text, remedy)


def as_text(check: Check) -> str:
    """A row as one line, and a second one with the remedy where there is one."""
    text = f"{check.status:<5} {check.name:<17} {' '.join(check.detail.split())}"
    return f"{text}\n{'':<23} -> {check.remedy}" if check.remedy else text


def check_python(arguments: argparse.Namespace) -> Rows:
    """The interpreter's version."""
    version = platform.python_version()
    if not SpecifierSet(SUPPORTED_PYTHON).contains(version, prereleases=True):
        raise TwilightError(f"{version} is outside the supported range {SUPPORTED_PYTHON}")
    yield Check("python", OK, f"{version} at {sys.executable}")


def check_sglang(arguments: argparse.Namespace) -> Rows:
    """SGLang's version against the supported range."""
    yield Check("sglang", OK, f"{check_sglang_version()} (supported: {SUPPORTED_SGLANG})")


def check_packages(arguments: argparse.Namespace) -> Rows:
    """The other packages; what only a GPU needs may be missing on a CPU."""
    import torch

    for name in ("twilight-sgl", "transformers", "torch", "triton", "flashinfer-python"):
        try:
            yield Check(name, OK, metadata.version(name))
        except metadata.PackageNotFoundError:
            if name in ("triton", "flashinfer-python") and not torch.cuda.is_available():
                yield Check(name, OK, "not installed; only a GPU needs it")
            else:
                status = WARN if name == "flashinfer-python" else FAIL
                yield Check(name, status, "not installed", REINSTALL)


def check_device(arguments: argparse.Namespace) -> Rows:
    """The GPUs, or the CPU, and the platform that SGLang picks."""
    import torch
    from sglang.srt import platforms

    active = type(platforms.current_platform).__qualname__
    cpu = f"CPU ({platform.machine()}, {os.cpu_count()} cores), platform {active}"
    if torch.cuda.is_available():
        yield _check_gpu(active)
    elif shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        detail = f"{cpu}: torch {torch.__version__} sees no GPU although nvidia-smi is here"
        yield Check("device", WARN, detail, "update the driver, or unset CUDA_VISIBLE_DEVICES")
    elif active == "SRTPlatform":
        remedy = f"add {PLATFORM_NAME} to SGLANG_PLUGINS, or unset it; else {REINSTALL}"
        yield Check("device", FAIL, f"{cpu}, which cannot serve here", remedy)
    elif os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        remedy = "unset SGLANG_USE_CPU_ENGINE (it needs a CPU build of sgl-kernel)"
        yield Check("device", WARN, cpu, remedy)
    else:
        yield Check("device", OK, f"{cpu} (plain PyTorch: slow, for trying things out)")


def _check_gpu(active: str) -> Check:
    import torch

    driver = "unknown"
    with contextlib.suppress(Exception):  # the rest of the row does not depend on NVML
        import pynvml

        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    major, minor = torch.cuda.get_device_capability()
    detail = (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, compute capability "
        f"{major}.{minor}, driver {driver}, CUDA {torch.version.cuda}, platform {active}"
    )
    remedy = "" if major >= 8 else "use a GPU of compute capability 8.0 or newer, for bfloat16"
    return Check("device", WARN if remedy else OK, detail, remedy)


def check_entry_points(arguments: argparse.Namespace) -> Rows:
    """Whether SGLang finds Twilight's two entry points and is not told to pass them over."""
    selected = os.environ.get("SGLANG_PLATFORM", "")
    listed = os.environ.get("SGLANG_PLUGINS", "")
    allowed = {name.strip() for name in listed.split(",") if name.strip()}
    for group, name in ENTRY_POINTS:
        is_plugin = name == PLUGIN_NAME
        found = list(metadata.entry_points(group=group, name=name))
        if not found:
            yield Check("entry point", FAIL, f"no {name} in {group}", REINSTALL)
        elif is_plugin and selected not in ("", PLATFORM_NAME):
            detail = f"SGLANG_PLATFORM={selected} makes SGLang pass {name} over"
            yield Check("entry point", FAIL, detail, "unset SGLANG_PLATFORM")
        elif allowed and name not in allowed and (is_plugin or not selected):
            detail = f"SGLANG_PLUGINS={listed} leaves {name} out"
            remedy = f"set SGLANG_PLUGINS={listed},{name}, or unset it"
            # A GPU serves without the platform; the device's row says whether a CPU does.
            yield Check("entry point", FAIL if is_plugin else WARN, detail, remedy)
        else:
            found[0].load()
            yield Check("entry point", OK, f"{name} in {group} is {found[0].value}")


def check_patches(arguments: argparse.Namespace) -> Rows:
    """Each patch's contract with the installed SGLang."""
    from twilight_sgl.patches import PatchError, all_patches

    for patch in all_patches():
        try:
            patch.check()
            yield Check("patch", OK, f"{patch.when} {patch.target}: {patch.why}")
        except PatchError as error:
            yield Check("patch", FAIL, f"{error} (why: {patch.why})", INSTALL_SGLANG)


def check_plugin(arguments: argparse.Namespace) -> Rows:
    """Load SGLang's plugins as a server does: ours must install and register its backend."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins import load_plugins

    from twilight_sgl import plugin

    load_plugins()
    if plugin.failure() is not None:
        raise TwilightError(f"the plugin could not be installed: {plugin.failure()}")
    if plugin.BACKEND not in ATTENTION_BACKENDS:
        raise TwilightError("SGLang did not load the plugin")
    yield Check("plugin", OK, f"installed; --decode-attention-backend {plugin.BACKEND} is known")


def check_config(arguments: argparse.Namespace) -> Rows:
    """The configuration that flags, file and environment give."""
    values = twilight_config.from_flags(arguments).to_dict()
    yield Check("config", OK, ", ".join(f"{name} {value}" for name, value in values.items()))


def check_model(arguments: argparse.Namespace) -> Rows:
    """The model's shape, what its tokens cost, and how many fit in the free memory."""
    from twilight_sgl import embedded_model

    folder = Path(arguments.model_path or embedded_model.embedded_model_path())
    if not arguments.model_path and not (folder / embedded_model.MANIFEST).is_file():
        detail = f"the embedded {embedded_model.MODEL_NAME} will be downloaded (93 MB) to {folder}"
        remedy = "python -m twilight_sgl.embedded_model makes it now; or pass --model-path"
        yield Check("model", WARN, detail, remedy)
    elif not folder.is_dir():
        remedy = "give a local folder; a hub's name is for the server alone"
        yield Check("model", WARN, f"{folder} is no folder here: not checked", remedy)
    else:
        yield from _check_model_folder(folder, twilight_config.from_flags(arguments))


def _check_model_folder(folder: Path, config: twilight_config.TwilightConfig) -> Rows:
    import torch
    from sglang.srt.configs.model_config import ModelConfig

    from twilight_sgl.pages.pool import bounds_dtype, summary_bytes_per_token
    from twilight_sgl.patches.server_args import refuse_model

    dtype = "auto" if torch.cuda.is_available() else "float32"
    model: Any = ModelConfig(str(folder), trust_remote_code=False, dtype=dtype)
    refuse_model(model)
    # Layers with a sliding window keep a bounded number of tokens, so they do not count here.
    growing = model.full_attention_layer_ids if model.is_hybrid_swa else None
    layers = range(model.num_attention_layers) if growing is None else growing
    selecting = len(set(layers) - set(config.skip_layers))
    if not selecting:
        raise TwilightError(f"{folder}: --twilight-skip-layers or sliding windows leave no layer")
    heads_kv, item_bytes = model.get_num_kv_heads(1), model.dtype.itemsize
    kv_bytes = len(layers) * heads_kv * (model.head_dim + model.v_head_dim) * item_bytes
    summary_bytes = selecting * summary_bytes_per_token(
        heads_kv,
        model.head_dim,
        bounds_dtype(config.bounds, model.dtype).itemsize,
        config.page_size,
        config.keeps_int4_keys,
    )
    detail = (
        f"{folder}: L={model.num_hidden_layers} ({selecting} selecting), "
        f"HQ={model.num_attention_heads}, HK={heads_kv}, D={model.head_dim}, "
        f"{model.context_len:,} tokens of context; bytes a token as {model.dtype}: "
        f"KV {kv_bytes:,}, summaries {summary_bytes:,.0f} ({summary_bytes / kv_bytes:.0%})"
    )
    remedy = "lower --twilight-min-context-tokens: no request is as long, so all stay dense"
    is_served_dense = config.min_context_tokens >= model.context_len
    yield Check("model", WARN, detail, remedy) if is_served_dense else Check("model", OK, detail)
    yield _check_memory(folder, model, kv_bytes, summary_bytes)


def _check_memory(folder: Path, model: Any, kv_bytes: int, summary_bytes: float) -> Check:
    import psutil
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free_bytes = torch.cuda.mem_get_info()[0] if gpus else psutil.virtual_memory().available
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored_dtype = getattr(model.hf_config, "dtype", None) or model.dtype
    weight_bytes = stored * model.dtype.itemsize // stored_dtype.itemsize
    room_bytes = max(free_bytes - weight_bytes, 0)
    dense, sparse = int(room_bytes // kv_bytes), int(room_bytes // (kv_bytes + summary_bytes))
    detail = (
        f"{free_bytes / 1e9:.1f} GB free on {'one GPU' if gpus else 'this machine'}, weights "
        f"{weight_bytes / 1e9:.1f} GB; the rest holds at most {dense:,} tokens of context without "
        f"Twilight, {sparse:,} with it (one request: up to {model.context_len:,})"
    )
    remedy = "free memory, serve a smaller model, or split it over GPUs with --tp-size"
    status = OK if sparse >= model.context_len else WARN if sparse or gpus > 1 else FAIL
    return Check("memory", status, detail, "" if status == OK else remedy)


# In this order: contracts are read from an SGLang that no plugin has patched yet.
CHECKS: tuple[tuple[str, Callable[[argparse.Namespace], Rows], str], ...] = (
    ("python", check_python, f"make the environment with a Python {SUPPORTED_PYTHON}"),
    ("sglang", check_sglang, INSTALL_SGLANG),
    ("packages", check_packages, REINSTALL),
    ("entry point", check_entry_points, REINSTALL),
    ("device", check_device, "unset SGLANG_PLATFORM, or set it to a platform this machine has"),
    ("patch", check_patches, INSTALL_SGLANG),
    ("plugin", check_plugin, "fix the rows above that fail; SGLang's log has the traceback"),
    ("config", check_config, "correct the setting in the flag, the file or TWILIGHT_CONFIG"),
    ("model", check_model, "serve another model with --model-path, or fix the rows above"),
)


if __name__ == "__main__":
    sys.exit(main())
