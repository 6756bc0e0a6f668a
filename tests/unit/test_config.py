"""Where settings come from, which wins, and what a wrong one says."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from twilight_sgl.config import TwilightConfig, add_flags, flag_of, from_flags
from twilight_sgl.errors import TwilightError

FIELDS = [knob.name for knob in dataclasses.fields(TwilightConfig)]

OTHER_VALUES = {
    "p": 0.5,
    "selector_budget": 1024.0,
    "min_candidate_tokens": 0,
    "estimator": "exact",
    "pruner": "none",
    "bounds": "keys",
    "skip_layers": (2, 5),
    "sink_tokens": 0,
    "recent_tokens": 128,
    "min_context_tokens": 0,
    "min_step_mb": 5,
    "page_size": 64,
    "audit_interval": 7,
    "telemetry": False,
    "events": "tcp://127.0.0.1:5599",
}

WRONG = [
    ("p", 0),
    ("p", 1.01),
    ("p", "most"),
    ("p", True),
    ("p", float("nan")),
    ("p", None),
    ("selector", "oracle"),
    ("selector", 3),
    ("selector_budget", 0),
    ("selector_budget", -1),
    ("selector_budget", 100.5),
    ("selector_budget", float("inf")),
    ("estimator", "int2"),
    ("pruner", "top_k"),
    ("pruner", None),
    ("bounds", "int8"),
    ("bounds", 8),
    ("skip_layers", "0,one"),
    ("skip_layers", "-1"),
    ("skip_layers", [0, True]),
    ("skip_layers", [0, 1.0]),
    ("skip_layers", 3),
    ("sink_tokens", -1),
    ("sink_tokens", 1.5),
    ("recent_tokens", "a few"),
    ("recent_tokens", False),
    ("min_candidate_tokens", -1),
    ("min_context_tokens", -2048),
    ("min_context_tokens", [1]),
    ("page_size", 8),
    ("page_size", "16.0"),
    ("audit_interval", -1),
    ("telemetry", "maybe"),
    ("telemetry", 1),
    ("telemetry", None),
    ("events", "127.0.0.1:5599"),
    ("events", "tcp://127.0.0.1"),
    ("events", "tcp://127.0.0.1:0"),
    ("events", "tcp://127.0.0.1:70000"),
    ("events", "ipc:///tmp/events"),
    ("events", 5599),
    ("sink_tokens", float("inf")),
    pytest.param("p", 10**400, id="p-of-400-digits"),
]


def parse(*argv: str) -> TwilightConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(argv))


def as_flag(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_nothing_given_is_the_default() -> None:
    assert parse() == TwilightConfig() == TwilightConfig.from_environment()


def test_flags_win_over_the_file_and_it_over_the_environment(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "TWILIGHT_CONFIG", '{"p": 0.1, "sink_tokens": 1, "recent_tokens": 1, "page_size": 32}'
    )
    config_file.write_text("p: 0.2\nsink_tokens: 2\n")
    config = parse("--twilight-config", str(config_file), "--twilight-p", "0.3")
    assert (config.p, config.sink_tokens, config.recent_tokens) == (0.3, 2, 1)
    assert config == TwilightConfig(p=0.3, sink_tokens=2, recent_tokens=1, page_size=32)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_field_has_a_flag(name: str) -> None:
    value = OTHER_VALUES[name]
    config = parse(flag_of(name), as_flag(value))
    assert config == dataclasses.replace(TwilightConfig(), **{name: value})
    assert config != TwilightConfig()


def test_other_values_cover_the_fields() -> None:
    assert set(OTHER_VALUES) | {"selector"} == set(FIELDS)


@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump], ids=["json", "yaml"])
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_file_holds_any_setting(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, dump: object, source: str
) -> None:
    values = OTHER_VALUES | {"skip_layers": [2, 5]}
    config_file.write_text(dump(values))
    if source == "flag":
        config = parse("--twilight-config", str(config_file))
    else:
        monkeypatch.setenv("TWILIGHT_CONFIG", str(config_file))
        config = TwilightConfig.from_environment()
    assert config == TwilightConfig(**OTHER_VALUES)


def test_empty_file_changes_nothing(config_file: Path) -> None:
    config_file.write_text("# nothing yet\n")
    assert parse("--twilight-config", str(config_file)) == TwilightConfig()


def test_environment_round_trip() -> None:
    config = TwilightConfig(**OTHER_VALUES)
    config.to_environment()
    assert TwilightConfig.from_environment() == config
    assert parse() == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda item: str(item).replace(" ", "-"))
def test_wrong_value_names_the_flag_and_the_value(name: str, value: object) -> None:
    with pytest.raises(TwilightError) as caught:
        TwilightConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{flag_of(name)} ({name}) is ")
    assert "; expected " in message
    shown = value if name != "skip_layers" or value != "-1" else (-1,)
    assert repr(shown) in message or f"is {value!s}" in message


@pytest.mark.parametrize(("name", "text"), [("p", "2"), ("skip_layers", "x"), ("page_size", "17")])
def test_wrong_flag_is_refused(name: str, text: str) -> None:
    with pytest.raises(TwilightError, match=flag_of(name)):
        parse(flag_of(name), text)


@pytest.mark.parametrize(
    ("name", "value"),
    [("p", 1), ("selector_budget", 1), ("sink_tokens", "4"), ("page_size", 32.0)],
)
def test_values_are_turned_into_the_field_type(name: str, value: object) -> None:
    kind = type(getattr(TwilightConfig(), name))
    got = getattr(TwilightConfig(**{name: value}), name)
    assert (type(got), got) == (kind, kind(value))


@pytest.mark.parametrize(
    ("text", "expected"), [("none", ()), ("", ()), ("3", (3,)), ("0, 2,4", (0, 2, 4))]
)
def test_layer_lists(text: str, expected: tuple[int, ...]) -> None:
    assert parse("--twilight-skip-layers", text).skip_layers == expected


@pytest.mark.parametrize("source", ["file", "environment", "mapping"])
def test_unknown_keys_are_named_with_the_known_ones(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    config_file.write_text("p: 0.5\nbudget: 3\n")
    with pytest.raises(TwilightError, match=r"unknown setting 'budget'.*selector_budget") as caught:
        if source == "file":
            parse("--twilight-config", str(config_file))
        elif source == "environment":
            monkeypatch.setenv("TWILIGHT_CONFIG", '{"budget": 3}')
            parse()
        else:
            TwilightConfig.from_mapping({"budget": 3}, "recipe")
    named = {"file": str(config_file), "environment": "TWILIGHT_CONFIG", "mapping": "recipe"}
    assert named[source] in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("[1, 2]", "must hold a mapping"), ("p: [", "cannot read"), (None, "cannot read")],
    ids=["a list", "not YAML", "no such file"],
)
def test_unreadable_file_is_named(config_file: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        config_file.write_text(content)
    with pytest.raises(TwilightError, match=complaint) as caught:
        parse("--twilight-config", str(config_file))
    assert "--twilight-config" in str(caught.value)
    assert str(config_file) in str(caught.value)


def test_binary_file_is_named(config_file: Path) -> None:
    config_file.write_bytes(b"\xff\xfe")
    with pytest.raises(TwilightError, match="--twilight-config: cannot read"):
        parse("--twilight-config", str(config_file))


def test_broken_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWILIGHT_CONFIG", '{"p": 0.5')
    with pytest.raises(TwilightError, match="TWILIGHT_CONFIG is not valid JSON"):
        parse()


def test_help_has_a_group_with_every_flag_and_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    (group,) = [group for group in parser._action_groups if group.title == "Twilight"]
    shown = {option for action in group._group_actions for option in action.option_strings}
    assert shown == {"--twilight-config", *map(flag_of, FIELDS)}
    text = " ".join(parser.format_help().split())
    assert text.count("(default: ") == len(FIELDS)
    assert "(half_bound, quest) (default: half_bound)" in text
    assert "(int4, int4_centred, exact) (default: int4)" in text
    assert "(top_p, none) (default: top_p)" in text
    assert "(auto, float8, keys) (default: auto)" in text
    assert group.description is not None
    assert "--decode-attention-backend twilight" in group.description


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TwilightConfig().p = 0.5


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, True),
        ({"estimator": "int4_centred"}, True),
        ({"estimator": "exact"}, False),
        ({"pruner": "none"}, False),
        ({"pruner": "none", "estimator": "exact"}, False),
    ],
)
def test_int4_keys_are_kept_for_what_reads_them(settings: dict[str, str], kept: bool) -> None:
    assert TwilightConfig(**settings).keeps_int4_keys is kept
