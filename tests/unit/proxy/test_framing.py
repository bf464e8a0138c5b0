"""A request that two parsers could read differently does not reach the engine."""

from __future__ import annotations

import pytest


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def serving(*parts):
    async def script(line):
        while await line.request() is not None:
            for part in parts:
                await line.send(part)

    return script


@pytest.mark.parametrize(
    "framing",
    [
        pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked", id="both"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5", id="both-reversed"),
        pytest.param(b"Content-Length: 5\r\nContent-Length: 6", id="two-lengths"),
        pytest.param(b"Content-Length: +5", id="signed-length"),
        pytest.param(b"Content-Length: 5, 5", id="listed-length"),
        pytest.param(b"Transfer-Encoding: xchunked", id="unknown-encoding"),
        pytest.param(b"Transfer-Encoding: gzip, chunked", id="two-encodings"),
        pytest.param(b"Transfer-Encoding: chunked, identity", id="chunked-not-last"),
        pytest.param(b"Transfer-Encoding : chunked", id="space-before-colon"),
        pytest.param(b"X: 1\r\n Transfer-Encoding: chunked", id="folded-line"),
        pytest.param(b"X: 1\nTransfer-Encoding: chunked", id="bare-newline"),
    ],
)
def test_a_request_whose_end_is_ambiguous_never_reaches_the_engine(engine, proxy, dial, framing):
    sock = dial(proxy.port)
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
        + framing
        + b"\r\n\r\n0\r\n\r\nGET /sleep HTTP/1.1\r\nHost: h\r\n\r\n"
    )

    status = int(sock.recv(65_536).split(b" ", 2)[1])

    assert status in (400, 501)
    assert engine.requests == []


def test_a_request_hidden_in_a_body_stays_a_body(engine, proxy, exchange_bytes):
    hidden = b"GET /sleep HTTP/1.1\r\nHost: h\r\n\r\n"
    exchange_bytes(
        proxy.port,
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk(hidden)
        + b"0\r\n\r\n",
    )

    assert [request.body for request in engine.requests] == [hidden]


def test_a_header_that_cannot_be_sent_unchanged_is_refused(engine, proxy, exchange_bytes):
    answer = exchange_bytes(
        proxy.port, b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: close\r\nX-Name: caf\xe9\r\n\r\n"
    )

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"not UTF-8" in answer
    assert engine.requests == []


def test_headers_of_many_kilobytes_pass_both_ways(engine, proxy, http):
    engine.script = serving(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n")

    answer = http.get(f"{proxy.url}/v1/models", headers={"x-long": "b" * 60_000})

    assert len(answer.headers["x-long"]) == 60_000
    assert engine.requests[0].values(b"x-long") == [b"b" * 60_000]
