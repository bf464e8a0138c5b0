"""Which routes pass the proxy, and its own routes."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake_proxy.app import create_app
from tokencake_proxy.routes import engine_route
from tokencake_proxy.settings import ProxySettings


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/chat/completions", "chat_completions"),
        ("/v1/completions", "completions"),
        ("/v1/responses", "responses"),
        ("/v1/responses/resp_1", "other_v1"),
        ("/v1/messages/count_tokens", "other_v1"),
        ("/v1/audio/transcriptions", "other_v1"),
        ("/v2/embed", "other_v2"),
        ("/tokenize", "tokenize"),
        ("/version", "version"),
        ("/v1/tokencake/events", "tokencake_events"),
        ("/v1/tokencake/state", "tokencake_state"),
        ("/v1/tokencake/decisions", "tokencake_decisions"),
    ],
)
def test_inference_routes_of_vllm_pass(path, route):
    assert engine_route(path) == route


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/server_info",
        "/pause",
        "/update_weights",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/scale_elastic_ep",
        "/start_profile",
        "/invocations",
        "/docs",
        "/openapi.json",
        "/load",
        "/",
        "/v1",
        "/v10/models",
        "/tokenize/",
        "*",
        "",
    ],
)
def test_development_and_administration_routes_do_not_pass(path):
    assert engine_route(path) is None


@pytest.mark.parametrize(
    "target", ["/v1/../sleep", "/v1/%2e%2e/sleep", "/v1/..%2fsleep", "/v1/..%5Csleep", "/v1/.", "/v1/x/../../sleep"]
)
def test_no_path_leaves_v1(engine, proxy, exchange_bytes, target):
    answer = exchange_bytes(proxy.port, f"POST {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())

    assert answer.startswith(b"HTTP/1.1 404 ")
    assert engine.requests == []


@given(st.text(st.sampled_from("/.v1\\%2eslp"), max_size=30))
def test_every_path_that_passes_is_below_an_open_prefix_without_dot_segments(tail):
    path = "/" + tail
    if engine_route(path) is not None:
        assert path.startswith(("/v1/", "/v2/"))
        assert not {".", ".."} & set(path.replace("\\", "/").split("/"))


def test_a_refused_path_gets_an_openai_error(engine, proxy, http):
    answer = http.post(f"{proxy.url}/collective_rpc", json={"method": "x"})

    error = answer.json()["error"]
    assert answer.status_code == 404
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "not_forwarded")
    assert "/collective_rpc does not pass this proxy" in error["message"]
    assert engine.connections == 0


def test_an_absolute_request_target_does_not_choose_another_host(engine, proxy, exchange_bytes):
    exchange_bytes(
        proxy.port, b"GET http://127.0.0.1:1/v1/models HTTP/1.1\r\nHost: 127.0.0.1:1\r\nConnection: close\r\n\r\n"
    )

    assert engine.requests[0].request_line == b"GET /v1/models HTTP/1.1"
    assert engine.requests[0].values(b"host") == [f"127.0.0.1:{engine.port}".encode()]


def test_a_websocket_is_refused_with_a_message(engine, proxy, exchange_bytes):
    answer = exchange_bytes(
        proxy.port,
        b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )

    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"does not forward WebSockets" in answer
    assert engine.connections == 0


def test_a_websocket_that_the_server_has_parsed_is_closed():
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(create_app(ProxySettings("http://127.0.0.1:1"))({"type": "websocket"}, None, send))

    assert sent == ["websocket.close"]


# --- /health --------------------------------------------------------------------------------------


def test_health_is_ok_when_the_engine_is(engine, proxy, http):
    answer = http.get(f"{proxy.url}/health")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "upstreams": {engine.url: "ok"}})
    assert engine.requests[0].request_line == b"GET /health HTTP/1.1"


def test_health_reports_the_engines_status(engine, proxy, http):
    async def script(line):
        await line.request()
        await line.answer(head=b"HTTP/1.1 503 Service Unavailable\r\n")

    engine.script = script
    answer = http.get(f"{proxy.url}/health")

    assert answer.status_code == 503
    assert answer.json() == {"status": "unavailable", "upstreams": {engine.url: "GET /health answered 503"}}


def test_health_reports_an_unreachable_engine(start_proxy, unused_port, http):
    answer = http.get(f"{start_proxy(f'http://127.0.0.1:{unused_port}').url}/health")

    assert answer.status_code == 503
    assert "Connection refused" in answer.json()["upstreams"][f"http://127.0.0.1:{unused_port}"]


def test_health_times_out(engine, start_proxy, http):
    async def script(line):
        await line.request()
        await engine.until_gone(line)

    engine.script = script
    answer = http.get(f"{start_proxy(engine.url, health_timeout_s=0.1).url}/health")

    assert answer.status_code == 503
    assert answer.json()["upstreams"][engine.url] == "GET /health had no answer within 0.1 s"


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_the_proxys_own_routes_are_read_only(engine, proxy, http, path):
    answer = http.post(f"{proxy.url}{path}")

    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert engine.connections == 0


# --- /metrics -------------------------------------------------------------------------------------


def test_requests_are_counted_by_route_method_and_status(proxy, http):
    http.post(f"{proxy.url}/v1/chat/completions", json={})
    http.get(f"{proxy.url}/sleep")

    def count(**labels):
        return proxy.metric("tokencake_proxy_requests_total", **labels)

    assert count(route="chat_completions", method="POST", status="200") == 1
    assert count(route="refused", method="GET", status="404") == 1
    assert proxy.metric("tokencake_proxy_time_to_first_byte_seconds_count", route="chat_completions") == 1


def test_no_client_can_add_labels(proxy, http):
    for index in range(3):
        http.get(f"{proxy.url}/v1/anything/{index}")
        http.get(f"{proxy.url}/elsewhere/{index}")
        http.request("PROPFIND", f"{proxy.url}/v1/files/{index}")

    text = http.get(f"{proxy.url}/metrics").text
    assert [
        line.rpartition(" ")[0] for line in text.splitlines() if line.startswith("tokencake_proxy_requests_total")
    ] == [
        'tokencake_proxy_requests_total{method="GET",route="other_v1",status="200"}',
        'tokencake_proxy_requests_total{method="GET",route="refused",status="404"}',
        'tokencake_proxy_requests_total{method="other",route="other_v1",status="200"}',
    ]


def test_bodies_of_events_are_counted_once_the_engine_has_accepted_them(engine, proxy, http):
    body = {"v": 1, "events": [{"type": "tool_start", "call": "c", "tool_call": "t", "tool": "search"}]}
    http.post(f"{proxy.url}/v1/tokencake/events", json=body, headers={"authorization": "Bearer k"})

    assert json.loads(engine.requests[0].body) == body
    assert engine.requests[0].values(b"authorization") == [b"Bearer k"]
    assert proxy.metric("tokencake_proxy_event_bodies_forwarded_total") == 1
