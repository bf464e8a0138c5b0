"""A background thread delivers events in batches, or drops and counts them; callers never wait and never fail."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake.protocol import MAX_EVENTS, AppEnd, ToolEnd, ToolStart
from tokencake_langgraph.sender import MAX_BATCH, REJECTED_PAUSE_S, EventSender, EventTarget

START = ToolStart("call", "tool_call", "search")


class Endpoint(httpx.BaseTransport):
    """Answers with the statuses it is given, the last one for ever; waits while it is held."""

    def __init__(self, *statuses: int | Exception) -> None:
        self.statuses: Iterator[int | Exception] = iter(statuses)
        self.last: int | Exception = 200
        self.bodies: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.go.set()
        self.has_arrived = threading.Event()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.has_arrived.set()
        assert self.go.wait(10)
        self.bodies.append(json.loads(request.read()))
        self.last = next(self.statuses, self.last)
        if isinstance(self.last, Exception):
            raise self.last
        return httpx.Response(self.last)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def make_sender() -> Callable[..., EventSender]:
    def make(endpoint: Endpoint, **settings: Any) -> EventSender:
        target = EventTarget("http://engine/v1/tokencake/events", SecretStr("key"))
        return EventSender(target, transport=endpoint, **{"retry_delays_s": (0.0, 0.0), **settings})

    return make


def test_events_put_together_are_sent_together(make_sender: Callable[..., EventSender]) -> None:
    endpoint = Endpoint(200)
    sender = make_sender(endpoint)
    for _ in range(3):
        sender.put(START)
    assert sender.flush(5)
    assert [len(body["events"]) for body in endpoint.bodies] == [3]
    assert sender.stats().sent == 3


def test_a_batch_is_never_larger_than_the_limit(make_sender: Callable[..., EventSender]) -> None:
    endpoint = Endpoint(200)
    sender = make_sender(endpoint)
    for _ in range(MAX_BATCH + 1):
        sender.put(START)
    assert sender.flush(5)
    assert sum(len(body["events"]) for body in endpoint.bodies) == MAX_BATCH + 1
    assert max(len(body["events"]) for body in endpoint.bodies) <= MAX_BATCH < MAX_EVENTS


def test_an_event_has_its_time_in_the_queue(make_sender: Callable[..., EventSender]) -> None:
    endpoint, clock = Endpoint(200), Clock()
    endpoint.go.clear()
    sender = make_sender(endpoint, clock=clock)
    sender.put(START)
    endpoint.has_arrived.wait(5)
    sender.put(ToolEnd("call", "tool_call"))
    sender.put(AppEnd("app"))
    clock.now_s += 7
    endpoint.go.set()
    assert sender.flush(5)
    assert [event.get("ago_s") for body in endpoint.bodies for event in body["events"]] == [0.0, 7.0, None]


def test_a_full_queue_drops_its_oldest_event(make_sender: Callable[..., EventSender]) -> None:
    endpoint = Endpoint(200)
    endpoint.go.clear()
    sender = make_sender(endpoint, max_queued=2)
    sender.put(START)
    endpoint.has_arrived.wait(5)
    for app in ("one", "two", "three"):
        sender.put(AppEnd(app))
    endpoint.go.set()
    assert sender.flush(5)
    assert [event["app"] for event in endpoint.bodies[1]["events"]] == ["two", "three"]
    assert sender.stats().dropped == 1


@pytest.mark.parametrize("trouble", [503, 429, httpx.ConnectError("down"), ValueError("?")])
def test_a_failed_post_is_retried(make_sender: Callable[..., EventSender], trouble: Any) -> None:
    endpoint = Endpoint(trouble, 200)
    sender = make_sender(endpoint)
    sender.put(START)
    assert sender.flush(5)
    assert (sender.stats().sent, sender.stats().failed_posts, sender.stats().dropped) == (1, 1, 0)


@pytest.mark.parametrize(("trouble", "posts"), [(404, 1), (405, 1), (307, 1), (401, 1), (403, 1), (503, 3)])
def test_after_a_permanent_error_the_sender_pauses(
    make_sender: Callable[..., EventSender], trouble: int, posts: int
) -> None:
    endpoint, clock = Endpoint(trouble), Clock()
    sender = make_sender(endpoint, clock=clock)
    sender.put(START)
    assert sender.flush(5)
    sender.put(START)
    assert sender.flush(5)
    assert len(endpoint.bodies) == posts
    assert (sender.stats().dropped, sender.stats().is_off) == (2, True)
    clock.now_s += REJECTED_PAUSE_S
    endpoint.statuses = iter([200])
    sender.put(START)
    assert sender.flush(5)
    assert (sender.stats().sent, sender.stats().is_off) == (1, False)


@pytest.mark.parametrize(("trouble", "level"), [(404, "INFO"), (401, "WARNING"), (400, "WARNING"), (500, "WARNING")])
def test_each_kind_of_failure_is_logged_once(
    make_sender: Callable[..., EventSender], caplog: pytest.LogCaptureFixture, trouble: int, level: str
) -> None:
    clock = Clock()
    sender = make_sender(Endpoint(trouble), clock=clock)
    with caplog.at_level("INFO", logger="tokencake_langgraph"):
        for _ in range(3):
            sender.put(START)
            assert sender.flush(5)
            clock.now_s += REJECTED_PAUSE_S
    assert [record.levelname for record in caplog.records] == [level]
    assert "key" not in caplog.text.replace("API key", "").replace("api_key", "")


def test_a_flush_of_a_hanging_target_times_out(make_sender: Callable[..., EventSender]) -> None:
    endpoint = Endpoint(200)
    endpoint.go.clear()
    sender = make_sender(endpoint)
    sender.put(START)
    assert not sender.flush(0.05)
    endpoint.go.set()
    assert sender.flush(5)


def test_the_repr_of_a_target_has_no_secrets() -> None:
    target = EventTarget(
        "http://engine", SecretStr("secret"), (("Authorization", "secret"),), "http://user:secret@proxy"
    )
    assert "secret" not in repr(target)


def test_with_an_invalid_proxy_only_the_events_are_lost(caplog: pytest.LogCaptureFixture) -> None:
    sender = EventSender(EventTarget("http://engine", proxy="nonsense"))
    sender.put(START)
    assert sender.flush(5)
    assert sender.stats().dropped == 1
    assert "http://engine" in caplog.text


def test_queued_events_are_sent_when_the_process_ends(engine: ScriptedEngine) -> None:
    program = f"""
        from tokencake.protocol import AppEnd
        from tokencake_langgraph.sender import EventTarget
        from tokencake_langgraph.senders import sender_for
        sender_for(EventTarget({engine.events_url!r})).put(AppEnd("last words"))
    """
    path = [part for part in sys.path if part]
    code = f"import sys; sys.path[:0] = {path!r}\n{textwrap.dedent(program)}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert [event["app"] for event in engine.events] == ["last words"]


def test_a_process_ends_although_its_target_hangs(engine: ScriptedEngine) -> None:
    engine.is_events_held = True
    program = f"""
        import time
        from tokencake.protocol import AppEnd
        from tokencake_langgraph import senders
        from tokencake_langgraph.sender import EventTarget
        senders.EXIT_FLUSH_S = 0.1
        senders.sender_for(EventTarget({engine.events_url!r})).put(AppEnd("unheard"))
    """
    path = [part for part in sys.path if part]
    code = f"import sys; sys.path[:0] = {path!r}\n{textwrap.dedent(program)}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert engine.events == []
