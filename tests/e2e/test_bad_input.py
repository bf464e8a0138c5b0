"""A malformed hint does not fail its call, a malformed event does not affect others, and all routes need the key."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}


def chat(server: Server, hint: Any = None) -> httpx.Response:
    body = {**CHAT, **({} if hint is None else {"vllm_xargs": {"tokencake": hint}})}
    return httpx.post(f"{server.proxy}/v1/chat/completions", json=body, headers=server.auth, timeout=60)


def send(server: Server, *events: dict[str, Any]) -> list[str]:
    answer = httpx.post(
        f"{server.proxy}/v1/tokencake/events", json={"v": 1, "events": list(events)}, headers=server.auth, timeout=60
    )
    assert answer.status_code == 200
    return [result["outcome"] for result in answer.json()["results"]]


def known_call(server: Server) -> str:
    call = f"call-{uuid.uuid4()}"
    assert chat(server, json.dumps({"v": 1, "session": f"session-{call}", "call": call})).status_code == 200
    return call


@pytest.mark.parametrize(
    "hint",
    [
        "{not json",
        "[]",
        '{"session": 7}',
        '{"v": 99, "session": "s"}',
        json.dumps({"session": "s", "agent": "x" * 2**20}),
    ],
    ids=["not JSON", "no object", "wrong type", "other version", "a megabyte"],
)
def test_a_bad_hint_is_void_and_the_answer_is_the_same(server: Server, hint: str) -> None:
    void = 'tokencake:hints_total{engine="0",outcome="void"}'
    before = server.metric(void)
    plain, hinted = chat(server), chat(server, hint)
    assert hinted.status_code == plain.status_code == 200
    assert hinted.json()["choices"] == plain.json()["choices"]
    assert server.metric(void) == before + 1


def test_hundreds_of_simultaneous_sessions_are_served_and_recorded(server: Server) -> None:
    """The bound of the registry itself is tested with 10,000 sessions in its unit test."""
    app = f"app-{uuid.uuid4()}"

    async def flood() -> list[int]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=server.proxy, headers=server.auth, timeout=120, limits=limits) as client:

            async def one(number: int) -> int:
                hint = json.dumps({"session": f"{app}-{number}", "call": f"{app}-{number}", "app": app})
                body = {**CHAT, "max_tokens": 1, "vllm_xargs": {"tokencake": hint}}
                return (await client.post("/v1/chat/completions", json=body)).status_code

            return await asyncio.gather(*(one(number) for number in range(300)))

    assert set(asyncio.run(flood())) == {200}
    assert len(server.state(app=app)["sessions"]) == 300


def test_events_of_unknown_calls_twice_and_in_the_wrong_order(server: Server) -> None:
    call = known_call(server)
    end = {"type": "tool_end", "call": call, "tool_call": "t", "duration_s": 0.5}
    start = {"type": "tool_start", "call": call, "tool_call": "t", "tool": "search"}
    assert send(server, {**end, "call": "never-seen"}) == ["unknown"]
    assert send(server, end, start, end, start) == ["applied", "late", "duplicate", "duplicate"]
    (entry,) = server.state(session=f"session-{call}")["calls"][0]["tools"]
    assert (entry["tool"], entry["duration_s"], entry["status"]) == ("search", 0.5, "ok")


def test_a_malformed_event_does_not_affect_its_batch(server: Server) -> None:
    call = known_call(server)
    start = {"type": "tool_start", "call": call, "tool_call": "t", "tool": "search"}
    assert send(server, {"type": "nonsense"}, start, {**start, "ago_s": "yesterday"}) == [
        "invalid",
        "applied",
        "invalid",
    ]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{not json", 400, "body is not JSON"),
        (b'{"events": 7}', 400, "body.events is 7; expected a list of events"),
        (
            json.dumps({"events": [{}] * 10_000}).encode(),
            413,
            "10000 events; at most 1000",
        ),
        (b"x" * 2_000_000, 413, "more than 262144 bytes"),
    ],
    ids=["not JSON", "no list", "10,000 events", "2 MB"],
)
def test_an_unusable_body_is_refused_with_the_reason(server: Server, body: bytes, status: int, reason: str) -> None:
    answer = httpx.post(f"{server.proxy}/v1/tokencake/events", content=body, headers=server.auth, timeout=60)
    assert answer.status_code == status
    assert reason in answer.json()["error"]["message"]


def test_the_state_refuses_an_absurd_limit(server: Server) -> None:
    answer = httpx.get(f"{server.engine}/v1/tokencake/state", params={"limit": 0}, headers=server.auth)
    assert answer.status_code == 400
    assert "limit is '0'; expected a number from 1 to 10000" in answer.text


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/tokencake/events"), ("GET", "/v1/tokencake/state")])
def test_no_route_answers_without_the_key(server: Server, method: str, path: str) -> None:
    assert httpx.request(method, f"{server.proxy}{path}", json={"events": []}).status_code == 401


def test_events_wake_an_idle_engine(server: Server) -> None:
    """One that slept on would be given up by the API server, with 503."""
    call = known_call(server)
    assert send(server, {"type": "tool_start", "call": call, "tool_call": "t", "tool": "x"}) == ["applied"]


def test_the_metrics_count_what_happened(server: Server) -> None:
    line = 'tokencake:events_total{engine="0",outcome="applied",type="tool_end"}'
    count, seconds = server.metric(line), server.metric('tokencake:tool_seconds_sum{engine="0"}')
    send(server, {"type": "tool_end", "call": known_call(server), "tool_call": "t", "duration_s": 2.5})
    assert server.metric(line) == count + 1
    assert server.metric('tokencake:tool_seconds_sum{engine="0"}') == pytest.approx(seconds + 2.5)
