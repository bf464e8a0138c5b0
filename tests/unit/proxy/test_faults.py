"""Engines fail and connections become stale: what the client receives."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading

import httpx
import openai
import pytest

from tokencake_proxy import transport

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [], "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}\n\n'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}"
MESSAGES = [{"role": "user", "content": "?"}]
PATIENCE_S = 10


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def breaking_after(*parts):
    async def script(line):
        await line.request()
        for part in parts:
            await line.send(part)

    return script


@contextlib.contextmanager
def read_until_broken(proxy):
    """A response whose body must end in an error."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=PATIENCE_S)) as connection:
        connection.request("POST", "/v1/completions", body=b"{}")
        with connection.getresponse() as response, pytest.raises(http.client.IncompleteRead) as broken:
            yield response, broken


# --- the engine is unreachable --------------------------------------------------------------------


def test_an_engine_that_is_down_is_named_with_the_way_out(start_proxy, http, unused_port):
    proxy = start_proxy(f"http://127.0.0.1:{unused_port}")

    answer = http.post(f"{proxy.url}/v1/chat/completions", json={})

    error = answer.json()["error"]
    assert answer.status_code == 503
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("server_error", "upstream_unreachable")
    assert f"http://127.0.0.1:{unused_port}" in error["message"]
    assert "--upstream" in error["message"]
    assert proxy.metric("tokencake_proxy_upstream_errors_total", kind="unreachable") == 1


def test_an_openai_client_raises_the_proxys_message(start_proxy, unused_port, http):
    proxy = start_proxy(f"http://127.0.0.1:{unused_port}")
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", http_client=http, max_retries=0)

    with pytest.raises(openai.InternalServerError, match="cannot be reached"):
        client.chat.completions.create(model="m", messages=MESSAGES)


def test_an_engine_that_comes_up_later_is_used_at_once(start_proxy, http, unused_port, start_engine):
    proxy = start_proxy(f"http://127.0.0.1:{unused_port}")
    assert http.get(f"{proxy.url}/v1/models").status_code == 503

    start_engine(unused_port)

    assert http.get(f"{proxy.url}/v1/models").status_code == 200


def test_a_host_that_accepts_no_connection_times_out(start_proxy, http):
    with contextlib.ExitStack() as opened:
        deaf = opened.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # fills the backlog of a listener that accepts none
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        proxy = start_proxy(f"http://127.0.0.1:{deaf.getsockname()[1]}", connect_timeout_s=0.2)

        answer = http.post(f"{proxy.url}/v1/completions", json={})

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_connect_timeout")


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_response_that_is_not_valid_http_becomes_a_502(engine, proxy, http, garbage):
    engine.script = breaking_after(garbage)

    answer = http.post(f"{proxy.url}/v1/completions", json={})

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_bad_answer")


# --- the engine breaks off ------------------------------------------------------------------------


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n"])
def test_a_request_on_a_new_connection_is_never_sent_twice(engine, proxy, http, part):
    engine.script = breaking_after(part)

    answer = http.post(f"{proxy.url}/v1/completions", json={})

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_disconnected")
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"half"], id="length"),
        pytest.param([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"half")], id="chunked"),
        pytest.param([SSE_HEAD, chunk(EVENT + b'data: {"cho')], id="inside-an-event"),
        pytest.param(
            [SSE_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"), chunk(EVENT)], id="compressed"
        ),
    ],
)
def test_a_response_that_breaks_off_is_not_ended_cleanly(engine, proxy, parts):
    engine.script = breaking_after(*parts)
    sent = parts[1].split(b"\r\n")[1] if b"chunked" in parts[0] else parts[1]

    with read_until_broken(proxy) as (response, broken):
        response.read()

    assert broken.value.partial == sent
    assert proxy.metric("tokencake_proxy_upstream_errors_total", kind="broken_stream") == 1


def test_a_response_that_becomes_malformed_is_not_ended_cleanly(engine, proxy, background, monkeypatch):
    monkeypatch.setattr(transport, "_MALFORMED_CHECK_S", 0.05)
    has_half = threading.Event()

    async def script(line):
        await line.request()
        await line.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"half"))
        await background.loop.run_in_executor(None, has_half.wait, PATIENCE_S)
        await line.send(b"zz\r\n")

    engine.script = script
    with read_until_broken(proxy) as (response, _):
        assert response.read(4) == b"half"
        has_half.set()
        response.read()


@pytest.mark.parametrize("events", [0, 2])
def test_a_broken_event_stream_ends_with_an_error_event(engine, proxy, exchange_bytes, events):
    engine.script = breaking_after(SSE_HEAD, *[chunk(EVENT)] * events)

    stream = exchange_bytes(proxy.port, POST).partition(b"\r\n\r\n")[2]

    *whole, last = stream.split(b"\r\n")[1::2]
    assert b"".join(whole) == EVENT * events
    assert last.startswith(b"event: error\ndata: {")
    assert last.endswith(b"\n\n")
    assert "broke off" in json.loads(last.partition(b"data: ")[2])["error"]["message"]
    assert not stream.endswith(b"0\r\n\r\n")


def test_an_openai_client_raises_the_reason_of_a_broken_stream(engine, openai_client):
    engine.script = breaking_after(SSE_HEAD, chunk(EVENT))
    stream = openai_client.chat.completions.create(model="m", messages=MESSAGES, stream=True)

    with pytest.raises(openai.APIError, match="broke off in the middle"):
        list(stream)


def test_after_a_broken_stream_the_next_call_succeeds(engine, proxy, http):
    async def script(line):
        await line.request()
        await (line.send(SSE_HEAD + chunk(EVENT)) if line.number == 1 else line.answer())

    engine.script = script
    with pytest.raises(httpx.RemoteProtocolError):
        http.post(f"{proxy.url}/v1/completions", json={})

    assert http.post(f"{proxy.url}/v1/completions", json={}).status_code == 200
    assert proxy.metric("tokencake_proxy_requests_in_flight") == 0


# --- stale connections ----------------------------------------------------------------------------


def going_stale(how):
    """Answer once on the first connection and hang up when it is used again."""

    async def script(line):
        await line.request()
        await line.answer(b"%d" % line.number)
        if line.number > 1:
            return
        await line.reader.read(1)
        if how == "reset":
            line.reset()
        elif how == "half an answer":
            await line.send(b"HTTP/1.1 20")

    return script


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("size", [0, 2, 3 * 2**20])
def test_a_request_on_a_stale_connection_is_sent_once_more(engine, proxy, http, how, method, size):
    engine.script = going_stale(how)
    http.post(f"{proxy.url}/v1/completions", json={})

    answer = http.request(method, f"{proxy.url}/v1/completions", content=b"x" * size)

    assert (answer.status_code, answer.content) == (200, b"2")
    assert engine.requests[-1].body == b"x" * size
    assert proxy.metric("tokencake_proxy_upstream_retries_total") == 1


def test_the_retry_uses_no_pooled_connection(engine, proxy, http):
    both_are_asked = asyncio.Event()

    async def script(line):
        await line.request()
        if line.number == 2:
            both_are_asked.set()
        await both_are_asked.wait()
        await line.answer(b"%d" % line.number)
        if line.number <= 2:
            await line.reader.read(1)

    engine.script = script
    threads = [threading.Thread(target=http.post, args=(f"{proxy.url}/v1/completions",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert http.post(f"{proxy.url}/v1/completions").content == b"3"


def test_a_request_with_a_partial_response_is_not_sent_again(engine, proxy, http):
    engine.script = going_stale("half an answer")
    http.post(f"{proxy.url}/v1/completions", json={})

    answer = http.post(f"{proxy.url}/v1/completions", json={})

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_disconnected")
    assert engine.connections == 1


def test_there_is_only_one_retry(engine, proxy, http):
    async def script(line):
        if line.number == 1:
            await going_stale("close")(line)

    engine.script = script
    http.post(f"{proxy.url}/v1/completions", json={})

    assert http.post(f"{proxy.url}/v1/completions", json={}).status_code == 502
    assert engine.connections == 2
