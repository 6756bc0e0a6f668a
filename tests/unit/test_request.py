"""What a request may ask for, and what a wrong wish says."""

from typing import Any

import pytest

from twilight_sgl.errors import TwilightError
from twilight_sgl.request import RequestOptions

ACCEPTED = {
    "no parameters": (None, RequestOptions()),
    "empty": ({}, RequestOptions()),
    "not an object": ("twilight", RequestOptions()),
    "only others": ({"__req__": object(), "top": 1}, RequestOptions()),
    "empty wish": ({"twilight": {}}, RequestOptions()),
    "p": ({"twilight": {"p": 0.5}, "other": 1}, RequestOptions(p=0.5)),
    "whole p": ({"twilight": {"p": 1}}, RequestOptions(p=1.0)),
    "p of null": ({"twilight": {"p": None}}, RequestOptions()),
    "off": ({"twilight": {"enabled": False}}, RequestOptions(enabled=False)),
    "report": ({"twilight": {"report": True}}, RequestOptions(report=True)),
    "on with p": ({"twilight": {"p": 0.1, "enabled": True}}, RequestOptions(0.1, True)),
}

REFUSED = {
    "wish is a number": ({"twilight": 0.5}, r"custom_params\.twilight must be an object"),
    "wish is null": ({"twilight": None}, r"custom_params\.twilight must be an object"),
    "wish is a list": ({"twilight": ["p"]}, r"custom_params\.twilight must be an object"),
    "unknown field": (
        {"twilight": {"q": 1}},
        r"unknown field 'q'; known: 'p', 'enabled', 'report'",
    ),
    "fields of two types": ({"twilight": {1: 2, "q": 1}}, "unknown field 1, 'q'"),
    "p is zero": ({"twilight": {"p": 0}}, r"twilight\.p must be a number in \(0, 1\], got 0"),
    "p above one": ({"twilight": {"p": 1.5}}, r"twilight\.p must be .* got 1\.5"),
    "p below zero": ({"twilight": {"p": -0.1}}, r"twilight\.p must be .* got -0\.1"),
    "p is text": ({"twilight": {"p": "0.5"}}, r"twilight\.p must be .* got '0\.5'"),
    "p is true": ({"twilight": {"p": True}}, r"twilight\.p must be .* got True"),
    "p is NaN": ({"twilight": {"p": float("nan")}}, r"twilight\.p must be .* got nan"),
    "p is infinite": ({"twilight": {"p": float("inf")}}, r"twilight\.p must be .* got inf"),
    "enabled is text": (
        {"twilight": {"enabled": "no"}},
        r"twilight\.enabled must be true or false, got 'no'",
    ),
    "report is text": (
        {"twilight": {"report": "yes"}},
        r"twilight\.report must be true or false, got 'yes'",
    ),
    "enabled is a number": ({"twilight": {"enabled": 0}}, r"enabled must be .* got 0"),
    "enabled is null": ({"twilight": {"enabled": None}}, r"enabled must be .* got None"),
}


@pytest.mark.parametrize(("params", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(params: Any, expected: RequestOptions) -> None:
    options = RequestOptions.from_custom_params(params)
    assert options == expected
    assert options.p is None or type(options.p) is float


@pytest.mark.parametrize(("params", "complaint"), REFUSED.values(), ids=REFUSED)
def test_refused(params: Any, complaint: str) -> None:
    with pytest.raises(TwilightError, match=complaint):
        RequestOptions.from_custom_params(params)


def test_huge_whole_p_is_refused() -> None:
    with pytest.raises(TwilightError, match=r"twilight\.p must be"):
        RequestOptions.from_custom_params({"twilight": {"p": 10**400}})
