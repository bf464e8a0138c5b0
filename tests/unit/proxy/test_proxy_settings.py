"""Which settings are taken, and what is said of those that are not."""

from __future__ import annotations

import pytest

from tokencake_proxy.settings import ProxySettings, SettingsError


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://gpu.example.org/engines/a/", "https://gpu.example.org/engines/a"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_upstream_is_kept_without_its_last_slash(written, kept):
    assert ProxySettings(written).upstream == kept


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "does not begin with http"),
        ("localhost:8000", "does not begin with http"),
        ("127.0.0.1:8000", "does not begin with http"),
        ("ftp://host", "does not begin with http"),
        ("http://", "names no host"),
        ("http://:8000", "names no host"),
        ("http://host:0", "no usable port"),
        ("http://host:99999", "out of range"),
        ("http://host:abc", "'http://host:abc'"),
        ("http://[::1", "'http://\\[::1'"),
        ("http://host /", "characters that no URL has"),
        ("http://host\r\nX: y", "characters that no URL has"),
        ("http://höst", "characters that no URL has"),
        ("http://user:secret@host", "names user, query or fragment"),
        ("http://host/?a=b", "names user, query or fragment"),
        ("http://host/a/../b", "walks with dots"),
        ("http://host:8000/v1", "leave off the /v1, clients send it: http://host:8000$"),
        ("http://host:8000/a/v1/", "leave off the /v1, clients send it: http://host:8000/a$"),
    ],
)
def test_an_upstream_that_cannot_work_is_refused_with_the_reason(written, reason):
    with pytest.raises(SettingsError, match=reason):
        ProxySettings(written)


def test_the_words_about_a_refused_upstream_do_not_repeat_a_password():
    with pytest.raises(SettingsError) as refused:
        ProxySettings("http://user:secret@host")

    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["connect_timeout_s", "health_timeout_s", "max_body_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_above_zero(name, value):
    with pytest.raises(SettingsError, match=f"{name} is {value}; expected a number above 0"):
        ProxySettings("http://h", **{name: value})


@pytest.mark.parametrize("name", ["idle_connection_s", "shutdown_grace_s"])
def test_waits_may_be_zero_and_not_less(name):
    ProxySettings("http://h", **{name: 0})
    with pytest.raises(SettingsError, match=f"{name} is -1"):
        ProxySettings("http://h", **{name: -1})
