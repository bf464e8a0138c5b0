"""Requests reach the engine, and responses the client, byte for byte."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading

import httpx
import pytest

GZIPPED = gzip.compress(b"x", mtime=0)
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def sse(text):
    delta = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }
    return b"data: " + json.dumps(delta).encode() + b"\n\n"


def split(response):
    """Status line, sorted header lines but those of the connection itself, and the body without chunks."""
    head, _, body = response.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    lines = sorted(line.lower() for line in lines)
    if b"transfer-encoding: chunked" in lines:
        whole = b""
        while body:
            size, _, rest = body.partition(b"\r\n")
            whole += rest[: int(size, 16)]
            body = rest[int(size, 16) + 2 :]
        body = whole
    return first, [line for line in lines if not line.startswith((b"connection:", b"transfer-encoding:"))], body


def serving(*parts):
    async def script(line):
        while await line.request() is not None:
            for part in parts:
                await line.send(part)

    return script


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(
            [
                b"HTTP/1.1 200 OK\r\nDate: today\r\nServer: uvicorn\r\nContent-Length: 13\r\n\r\n",
                b'{"a": "\xc3\xa4"}\n',
            ],
            id="json",
        ),
        pytest.param([SSE_HEAD, chunk(sse("a")), chunk(sse("b") + b": keep-alive\n\n"), b"0\r\n\r\n"], id="events"),
        pytest.param(
            [
                b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(GZIPPED),
                GZIPPED,
            ],
            id="compressed",
        ),
        pytest.param(
            [
                b"HTTP/1.1 404 Not Found\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2; Path=/\r\n",
                b"X: \xe9\r\nContent-Length: 0\r\n\r\n",
            ],
            id="repeated-headers",
        ),
        pytest.param([b"HTTP/1.1 204 No Content\r\n\r\n"], id="no-content"),
        pytest.param([b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"], id="not-modified"),
        pytest.param([b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}"], id="refused"),
    ],
)
def test_a_response_through_the_proxy_is_the_engines_response(engine, proxy, exchange_bytes, parts):
    async def script(line):
        await line.request()
        for part in parts:
            await line.send(part)

    engine.script = script
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"

    direct, proxied = exchange_bytes(engine.port, request), exchange_bytes(proxy.port, request)

    assert split(proxied) == split(direct)


def test_the_response_to_a_head_request_keeps_its_content_length(engine, proxy, http):
    engine.script = serving(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")

    answers = [http.head(f"{proxy.url}/v1/models") for _ in range(2)]

    assert [(answer.headers["content-length"], answer.content) for answer in answers] == [("1234", b"")] * 2


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models/org%2Fmodel",
        "/v1/models/a%7eb%7Ec%c3%a4%2e%41",
        "/v1/models?q=a+b%20c&&empty=&x=%2F;y#",
        "/v1//models",
        "/v1/models/:@!$&'()*+,=",
        "/%761/models",
        "/v1/files?path=../../etc",
    ],
)
def test_path_and_query_reach_the_engine_unchanged(engine, proxy, exchange_bytes, target):
    exchange_bytes(proxy.port, f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())

    assert engine.requests[0].request_line == f"GET {target.removesuffix('#')} HTTP/1.1".encode()


def test_the_path_of_an_upstream_is_put_first(engine, start_proxy, http):
    proxy = start_proxy(f"{engine.url}/engines/a/")

    http.get(f"{proxy.url}/v1/models?x=1")

    assert engine.requests[0].request_line == b"GET /engines/a/v1/models?x=1 HTTP/1.1"


def test_the_engine_gets_the_clients_headers_and_no_others(engine, proxy, exchange_bytes):
    lines = [
        b"x-request-id: call-1",
        b"authorization: Bearer k",
        b"x-twice: 1",
        b"x-twice: 2, 3",
        b"x-text: gr\xc3\xbc\xc3\x9fe",
        b"x-empty: ",
    ]
    exchange_bytes(
        proxy.port,
        b"GET /v1/models HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n" + b"\r\n".join(lines) + b"\r\n\r\n",
    )

    host, *others = engine.requests[0].lines
    assert host == (b"Host", f"127.0.0.1:{engine.port}".encode())
    assert [name + b": " + value for name, value in others] == lines


def test_hop_by_hop_headers_are_not_forwarded(engine, proxy, exchange_bytes):
    async def script(line):
        await line.request()
        await line.answer(
            head=b"HTTP/1.1 200 OK\r\nConnection: close, X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\n"
            b"Trailer: x\r\nUpgrade: h2c\r\nProxy-Authenticate: Basic\r\nX-Public: 2\r\n"
        )

    engine.script = script
    answer = exchange_bytes(
        proxy.port,
        b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: close, x-private\r\nX-Private: 1\r\nTE: trailers\r\n"
        b"Keep-Alive: 1\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\nX-Public: 2\r\n\r\n",
    )

    assert engine.requests[0].names == {b"host", b"x-public"}
    assert split(answer)[1] == [b"content-length: 2", b"x-public: 2"]


def test_cookies_of_one_client_are_not_sent_for_the_next(engine, proxy):
    engine.script = serving(b"HTTP/1.1 200 OK\r\nSet-Cookie: who=me; Path=/\r\nContent-Length: 0\r\n\r\n")

    for _ in range(2):
        httpx.get(f"{proxy.url}/v1/models", trust_env=False)

    assert [request.values(b"cookie") for request in engine.requests] == [[], []]


def test_a_redirect_to_the_engine_becomes_a_redirect_to_the_proxy(engine, proxy, http):
    location = f"Location: {engine.url}/v1/models\r\n".encode()
    engine.script = serving(b"HTTP/1.1 307 Temporary Redirect\r\n" + location + b"Content-Length: 0\r\n\r\n")

    assert http.get(f"{proxy.url}/v1/models/").headers["location"] == "/v1/models"


def test_another_redirect_is_forwarded_unchanged(engine, proxy, http):
    engine.script = serving(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 0\r\n\r\n")

    assert http.get(f"{proxy.url}/v1/models").headers["location"] == "http://127.0.0.1:1/x"


@pytest.mark.parametrize("size", [0, 1, 65_537, 3 * 2**20])
def test_bodies_of_any_size_pass_both_ways(engine, proxy, http, size):
    async def script(line):
        while (received := await line.request()) is not None:
            await line.answer(received.body)

    engine.script = script
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    assert http.post(f"{proxy.url}/v1/completions", content=body).content == body
    assert engine.calls[0].values(b"content-length") == [b"%d" % size]


def test_a_chunked_request_reaches_the_engine_with_its_length(engine, proxy, http):
    http.post(f"{proxy.url}/v1/completions", content=iter([b'{"a"', b": 1}"]))

    assert engine.requests[0].body == b'{"a": 1}'
    assert engine.requests[0].values(b"content-length") == [b"8"]
    assert b"transfer-encoding" not in engine.requests[0].names


def test_expect_100_continue_is_answered(proxy, engine, dial):
    sock = dial(proxy.port)
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")

    assert sock.recv(1000).startswith(b"HTTP/1.1 100 ")
    sock.sendall(b"{}")
    assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert b"expect" not in engine.requests[0].names


def test_each_piece_of_a_stream_arrives_before_the_next_is_sent(engine, proxy, http, background):
    may_go_on = threading.Event()

    async def script(line):
        await line.request()
        await line.send(SSE_HEAD)
        for text in "abc":
            await background.loop.run_in_executor(None, may_go_on.wait, 10)
            may_go_on.clear()
            await line.send(chunk(sse(text)))
        await line.send(b"0\r\n\r\n")

    engine.script = script
    seen = []
    with http.stream("POST", f"{proxy.url}/v1/chat/completions", json={}) as response:
        may_go_on.set()
        for piece in response.iter_raw():
            seen.append(piece)
            may_go_on.set()

    assert seen == [sse("a"), sse("b"), sse("c")]


def test_an_openai_client_streams(engine, openai_client):
    engine.script = serving(SSE_HEAD, chunk(sse("Hel")), chunk(sse("lo")), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n")

    stream = openai_client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], stream=True)

    assert "".join(part.choices[0].delta.content for part in stream) == "Hello"
    assert engine.requests[0].values(b"authorization") == [b"Bearer k"]


def test_a_response_may_take_longer_than_the_connect_timeout(engine, start_proxy, http, background):
    proxy = start_proxy(engine.url, connect_timeout_s=0.1, health_timeout_s=0.1)
    thinking_s = 0.3

    async def script(line):
        await line.request()
        thought = background.loop.create_future()
        background.loop.call_later(thinking_s, thought.set_result, None)
        await thought
        await line.answer()

    engine.script = script
    assert http.post(f"{proxy.url}/v1/completions", json={}).status_code == 200


def test_a_pooled_connection_is_reused(engine, proxy, http):
    for _ in range(3):
        http.post(f"{proxy.url}/v1/completions", json={})

    assert (len(engine.requests), engine.connections) == (3, 1)


def test_no_call_waits_for_another_in_the_proxy(engine, proxy, dial):
    calls = 120
    all_arrived = asyncio.Event()

    async def script(line):
        await line.request()
        if len(engine.requests) == calls:
            all_arrived.set()
        await all_arrived.wait()
        await line.answer()

    engine.script = script
    clients = [dial(proxy.port) for _ in range(calls)]
    for client in clients:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")

    assert all(client.recv(100).startswith(b"HTTP/1.1 200 ") for client in clients)
