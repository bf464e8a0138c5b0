"""Clients disconnect or send too much: the engine is freed, and other calls are not affected."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [], "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}\n\n'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}"
PATIENCE_S = 10


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def until(is_true):
    """Wait for a value of `/metrics`, which no event signals."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline


# --- the client disconnects -----------------------------------------------------------------------


def leave(sock, how):
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_disconnect_before_the_first_byte_frees_the_engine(engine, proxy, dial, how):
    asked = threading.Event()

    async def script(line):
        await line.request()
        asked.set()
        await engine.until_gone(line)

    engine.script = script
    sock = dial(proxy.port)
    sock.sendall(POST)
    assert asked.wait(PATIENCE_S)
    leave(sock, how)

    assert engine.saw_disconnect.wait(PATIENCE_S)
    until(lambda: proxy.metric("tokencake_proxy_client_disconnects_total", phase="waiting") == 1)
    assert proxy.metric("tokencake_proxy_requests_total", route="completions", method="POST", status="none") == 1


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_disconnect_during_a_stream_frees_the_engine(engine, proxy, dial, how):
    async def script(line):
        await line.request()
        await line.send(SSE_HEAD + chunk(EVENT))
        await engine.until_gone(line)

    engine.script = script
    sock = dial(proxy.port)
    sock.sendall(POST)
    received = b""
    while EVENT not in received:
        received += sock.recv(65_536)
    leave(sock, how)

    assert engine.saw_disconnect.wait(PATIENCE_S)
    until(lambda: proxy.metric("tokencake_proxy_client_disconnects_total", phase="streaming") == 1)
    until(lambda: proxy.metric("tokencake_proxy_requests_in_flight") == 0)


def test_a_disconnect_of_a_client_that_stopped_reading_frees_the_engine(engine, proxy, dial):
    async def script(line):
        await line.request()
        await line.send(SSE_HEAD)
        while True:
            await line.send(chunk(b"x" * 65_536))

    engine.script = script
    sock = dial(proxy.port)
    sock.sendall(POST)
    sock.recv(100)
    leave(sock, "close")

    assert engine.saw_disconnect.wait(PATIENCE_S)


def test_a_disconnect_during_the_upload_does_not_reach_the_engine(engine, proxy, dial):
    sock = dial(proxy.port)
    sock.sendall(POST[:-1])
    sock.close()

    until(lambda: proxy.metric("tokencake_proxy_client_disconnects_total", phase="upload") == 1)
    assert engine.connections == 0


def test_a_disconnect_does_not_affect_the_next_call(engine, proxy, dial, http):
    async def script(line):
        await line.request()
        if line.number == 1:
            await engine.until_gone(line)
        else:
            await line.answer(b"second")

    engine.script = script
    sock = dial(proxy.port)
    sock.sendall(POST)
    until(lambda: engine.requests)
    sock.close()
    assert engine.saw_disconnect.wait(PATIENCE_S)

    assert http.post(f"{proxy.url}/v1/completions").content == b"second"


# --- too much -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"x" * 2_000_000, "in pieces"])
def test_a_body_over_the_limit_is_refused_with_413(engine, start_proxy, http, content):
    proxy = start_proxy(engine.url, max_body_bytes=1_000_000)

    answer = http.post(
        f"{proxy.url}/v1/completions", content=iter([b"x" * 1_000_000] * 2) if content == "in pieces" else content
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_long")
    assert "1000000 bytes" in answer.json()["error"]["message"]
    assert engine.calls == []


def test_a_body_of_exactly_the_limit_passes(engine, start_proxy, http):
    proxy = start_proxy(engine.url, max_body_bytes=1_000)

    assert http.post(f"{proxy.url}/v1/completions", content=b"x" * 1_000).status_code == 200
