"""A dialect is one entry; routes, hint paths and errors follow from it."""

from __future__ import annotations

import json

import pytest

from tokencake_proxy.dialects import DEFAULT_DIALECT, DIALECTS, HINT_PATHS, SSE_EVENT_ENDS, dialect_of
from tokencake_proxy.errors import Refusal
from tokencake_proxy.routes import ROUTES, engine_route

REFUSAL = Refusal(503, "shutting_down", "Send the request again.")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_the_route_of_a_dialect_passes_under_its_name(dialect):
    assert engine_route(dialect.path) == dialect.name
    assert dialect_of(dialect.name) is dialect


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_dialect_writes_the_same_error_as_a_body_and_as_an_event(dialect):
    name, data, *rest = REFUSAL.event(dialect).split(b"\n")

    event = json.loads(data.removeprefix(b"data: "))
    assert (name, event["type"], rest) == (b"event: error", "error", [b"", b""])
    assert event["error"] == json.loads(REFUSAL.body(dialect))["error"]
    assert event["error"] == {
        "message": "Send the request again.",
        "type": "server_error",
        "param": None,
        "code": "shutting_down",
    }


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_an_error_event_ends_as_the_dialects_events_end(dialect):
    assert REFUSAL.event(dialect).endswith(dialect.event_ends)
    assert set(dialect.event_ends) <= set(SSE_EVENT_ENDS)


def test_the_proxy_scopes_every_hint_path():
    assert set(HINT_PATHS) == {dialect.hint_path for dialect in DIALECTS} - {None}


def test_names_and_paths_are_unique():
    assert len(ROUTES) == len(set(ROUTES.values()))
    assert len({dialect.path for dialect in DIALECTS}) == len(DIALECTS)


def test_a_route_without_a_dialect_has_the_default_one():
    assert dialect_of("tokenize") is dialect_of("other_v1") is DEFAULT_DIALECT
