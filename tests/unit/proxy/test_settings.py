"""Valid settings, and the errors about invalid ones."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from tokencake.settings import SettingsError
from tokencake_proxy.errors import RefusalReason
from tokencake_proxy.settings import NUMBER_SETTINGS, ProxySettings, read_number_settings

DOCS = Path(__file__).parents[3] / "docs" / "proxy.md"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://gpu.example.org/engines/a/", "https://gpu.example.org/engines/a"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_upstream_is_stored_without_its_trailing_slash(written, kept):
    assert ProxySettings(written).upstream == kept


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "does not begin with http"),
        ("localhost:8000", "does not begin with http"),
        ("127.0.0.1:8000", "does not begin with http"),
        ("ftp://host", "does not begin with http"),
        ("http://", "has no host"),
        ("http://:8000", "has no host"),
        ("http://host:0", "no usable port"),
        ("http://host:99999", "out of range"),
        ("http://host:abc", "'http://host:abc'"),
        ("http://[::1", "'http://\\[::1'"),
        ("http://host /", "characters that are not allowed in a URL"),
        ("http://host\r\nX: y", "characters that are not allowed in a URL"),
        ("http://höst", "characters that are not allowed in a URL"),
        ("http://user:secret@host", "has a user, query or fragment"),
        ("http://host/?a=b", "has a user, query or fragment"),
        ("http://host/a/../b", "has dot segments"),
        ("http://host:8000/v1", "omit the /v1, clients send it: http://host:8000$"),
        ("http://host:8000/a/v1/", "omit the /v1, clients send it: http://host:8000/a$"),
    ],
)
def test_an_invalid_upstream_is_refused_with_the_reason(written, reason):
    with pytest.raises(SettingsError, match=reason):
        ProxySettings(written)


def test_the_error_about_an_upstream_does_not_show_a_password():
    with pytest.raises(SettingsError) as refused:
        ProxySettings("http://user:secret@host")

    assert "secret" not in str(refused.value)


MAY_BE_ZERO = ("idle_connection_s", "shutdown_grace_s")


@pytest.mark.parametrize("name", [number.name for number in NUMBER_SETTINGS if number.name not in MAY_BE_ZERO])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_above_zero(name, value):
    with pytest.raises(SettingsError, match=f"{name} is {value}; expected a number above 0"):
        ProxySettings("http://h", **{name: value})


@pytest.mark.parametrize("name", MAY_BE_ZERO)
def test_waits_may_be_zero_and_not_less(name):
    ProxySettings("http://h", **{name: 0})
    with pytest.raises(SettingsError, match=f"{name} is -1"):
        ProxySettings("http://h", **{name: -1})


def test_a_body_limit_over_the_budget_is_refused():
    with pytest.raises(
        SettingsError, match="max_bodies_bytes is 199; expected at least twice max_body_bytes, which is 1"
    ):
        ProxySettings("http://h", max_body_bytes=100, max_bodies_bytes=199)


@pytest.mark.parametrize("number", NUMBER_SETTINGS, ids=lambda number: number.name)
def test_a_flag_overrides_a_variable_and_this_the_default(number):
    value = number.default + 1

    assert read_number_settings({}, {}) == {}
    assert read_number_settings({}, {number.variable: str(value)}) == {number.name: value}
    assert read_number_settings({number.name: str(value)}, {number.variable: "7"}) == {number.name: value}
    assert read_number_settings({number.name: None}, {number.variable: ""}) == {}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("max_head_bytes", "fast", "'fast'; expected a whole number, for example 65536"),
        ("max_head_bytes", "1e6", "'1e6'; expected a whole number, for example 65536"),
        ("head_timeout_s", "10s", "'10s'; expected a number, for example 10.0"),
        ("head_timeout_s", "nan", "nan; expected a number above 0, for example 10.0"),
        ("idle_connection_s", "-1", "-1.0; expected a number of 0 or more, for example 4.0"),
    ],
)
def test_an_invalid_value_is_named_with_its_source_and_the_way_out(name, text, words):
    (number,) = [number for number in NUMBER_SETTINGS if number.name == name]

    with pytest.raises(SettingsError) as by_flag:
        read_number_settings({name: text}, {})
    with pytest.raises(SettingsError) as by_variable:
        read_number_settings({}, {number.variable: text})

    assert str(by_flag.value) == f"{number.flag} is {words}"
    assert str(by_variable.value) == f"{number.variable} is {words}"


@pytest.mark.parametrize("number", NUMBER_SETTINGS, ids=lambda number: number.name)
def test_each_numeric_setting_is_a_line_of_the_docs(number):
    line = f"| `{number.flag}` | `{number.variable}` | {number.default} | {number.meaning} |"

    assert line in DOCS.read_text().splitlines()


@pytest.mark.parametrize("reason", get_args(RefusalReason))
def test_each_refusal_reason_is_a_line_of_the_docs(reason):
    assert any(line.startswith(f"| `{reason}` |") for line in DOCS.read_text().splitlines())
