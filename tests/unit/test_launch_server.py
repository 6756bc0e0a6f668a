"""What the launcher adds to a command line, and what it does when it cannot."""

from pathlib import Path

import pytest

from twilight_sgl import embedded_model, launch_server
from twilight_sgl.errors import TwilightError
from twilight_sgl.launch_server import main, with_defaults

BACKEND = ["--decode-attention-backend", "twilight"]
MODEL = ["--model-path", "embedded"]


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the embedded model; returns a list with an entry each time it is asked for."""
    asked: list[str] = []

    def ensure() -> Path:
        asked.append("embedded")
        return Path("embedded")

    monkeypatch.setattr(embedded_model, "ensure_embedded_model", ensure)
    return asked


ADDED = {
    "nothing given": ([], [*BACKEND, *MODEL]),
    "only others": (["--port", "1"], [*BACKEND, *MODEL]),
    "model": (["--model-path", "m"], BACKEND),
    "model with equals": (["--model-path=m"], BACKEND),
    "model by its short name": (["--model", "m"], BACKEND),
    "short name with equals": (["--model=m"], BACKEND),
    "backend": (["--decode-attention-backend", "fa3"], MODEL),
    "backend with equals": (["--decode-attention-backend=fa3"], MODEL),
    "both": (["--model=m", "--decode-attention-backend", "fa3"], []),
    "a longer flag is another": (["--model-path-of-another", "m"], [*BACKEND, *MODEL]),
}

IN_FILE = {
    "empty": ("", [*BACKEND, *MODEL]),
    "others": ("port: 1\n", [*BACKEND, *MODEL]),
    "model": ("model-path: m\n", BACKEND),
    "model with underscores": ("model_path: m\n", BACKEND),
    "model by its short name": ("model: m\n", BACKEND),
    "backend": ("decode-attention-backend: fa3\n", MODEL),
    "both": ("decode_attention_backend: fa3\nmodel-path: m\n", []),
}


@pytest.mark.parametrize(("given", "added"), ADDED.values(), ids=ADDED)
def test_defaults_are_added_behind_what_is_given(
    given: list[str], added: list[str], made: list[str]
) -> None:
    assert with_defaults(list(given)) == [*given, *added]
    assert made == (["embedded"] if "embedded" in added else [])


@pytest.mark.parametrize("form", ["two words", "equals"])
@pytest.mark.parametrize(("content", "added"), IN_FILE.values(), ids=IN_FILE)
def test_keys_of_a_config_file_count_as_given(
    tmp_path: Path, content: str, added: list[str], form: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    given = ["--config", str(file)] if form == "two words" else [f"--config={file}"]
    assert with_defaults(list(given)) == [*given, *added]


@pytest.mark.parametrize("content", [None, "model: ["], ids=["no such file", "not YAML"])
def test_unreadable_config_file_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TwilightError, match="--config: cannot read") as caught:
        with_defaults(["--config", str(file)])
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"5"], ids=["binary", "a number"])
def test_config_file_that_holds_no_settings_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(TwilightError, match="--config"):
        with_defaults(["--config", str(file)])


def test_no_model_to_serve_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Path:
        raise TwilightError("no network; use --model-path")

    monkeypatch.setattr(embedded_model, "ensure_embedded_model", fail)
    monkeypatch.setattr(launch_server, "_run", lambda argv: pytest.fail("the server started"))
    assert main([]) == 2
    errors = capsys.readouterr().err
    assert errors == "twilight_sgl.launch_server: error: no network; use --model-path\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_fetches_no_model(monkeypatch: pytest.MonkeyPatch, made: list[str], flag: str) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(launch_server, "_run", lambda argv: ran.append(argv) or 0)
    assert main([flag]) == 0
    assert (ran, made) == ([[flag]], [])


def test_main_runs_with_the_defaults_and_leaves_its_argument_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(launch_server, "_run", lambda argv: ran.append(argv) or 0)
    given = ["--port", "1"]
    assert main(given) == 0
    assert ran == [["--port", "1", *BACKEND, *MODEL]]
    assert given == ["--port", "1"]
