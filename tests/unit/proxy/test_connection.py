"""An incomplete request costs little: bytes, header fields, seconds and connections are bounded."""

from __future__ import annotations

import json
import threading

import pytest

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
CLOSING = HEAD + b"Connection: close\r\n"
WHOLE = CLOSING + b"Content-Length: 2\r\n\r\n{}"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def code_of(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


def refusal_log(proxy, reason):
    return proxy.metric("tokencake_proxy_refusals_total", reason=reason)


def read_to_end(sock):
    """All bytes until the peer closes or resets."""
    pieces = []
    try:
        while piece := sock.recv(65_536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


# --- too much -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status"),
    [
        pytest.param(HEAD + b"".join(b"X-%d: 1\r\n" % number for number in range(300)) + b"\r\n", 431, id="many-lines"),
        pytest.param(HEAD + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431, id="long-value"),
        pytest.param(HEAD + b"X" * 70_000 + b": 1\r\n\r\n", 431, id="long-name"),
        pytest.param(HEAD + (b"X: " + b"a" * 8_000 + b"\r\n") * 20 + b"\r\n", 431, id="many-bytes"),
        pytest.param(b"GET /v1/models?" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414, id="long-target"),
        pytest.param(b"\r\n" * 70_000 + WHOLE, 431, id="empty-lines"),
        pytest.param(
            CLOSING + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 2_000_000 + b"\r\nx\r\n0\r\n\r\n",
            431,
            id="chunk-extension",
        ),
        pytest.param(
            CLOSING + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"X: 1\r\n" * 300 + b"\r\n",
            431,
            id="trailers",
        ),
        pytest.param(
            CLOSING + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: " + b"a" * 2_000_000, 431, id="long-trailer"
        ),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1_000, 1_000_000])
def test_a_head_over_the_limit_is_refused(engine, proxy, dial, head, status, piece_bytes):
    sock = dial(proxy.port)
    try:
        for start in range(0, len(head), piece_bytes):
            sock.sendall(head[start : start + piece_bytes])
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before all was sent
    answer = read_to_end(sock)

    assert (status_of(answer), code_of(answer)) == (status, "head_too_long")
    assert engine.requests == []
    assert refusal_log(proxy, "head_too_long") == 1


def test_an_endless_head_is_refused(proxy, dial):
    sock = dial(proxy.port)
    sock.sendall(HEAD)
    lines = (b"X: " + b"a" * 8_000 + b"\r\n") * 8_000

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        sock.sendall(lines)


def test_a_head_within_the_limits_passes_in_any_pieces(engine, proxy, dial):
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 200) for number in range(200))
    whole = CLOSING + lines + b"Content-Length: 2\r\n\r\n{}"
    sock = dial(proxy.port)
    for start in range(0, len(whole), 7_777):
        sock.sendall(whole[start : start + 7_777])

    assert status_of(read_to_end(sock)) == 200
    assert len(engine.requests[0].names) > 200


def test_pipelined_requests_are_answered_up_to_the_limit(engine, proxy, dial):
    sock = dial(proxy.port)
    sock.sendall((HEAD + b"Content-Length: 2\r\n\r\n{}") * 1_000)

    answers = read_to_end(sock)

    # Nothing stands in the middle of another answer.
    assert answers.replace(b'{"saw": "POST /v1/completions HTTP/1.1"}', b"").count(
        b"HTTP/1.1 200 OK\r\n"
    ) == answers.count(b"HTTP/1.1 ")
    assert 1 < len(engine.requests) < 50
    assert refusal_log(proxy, "bad_request") == 1


def test_a_disconnect_cancels_all_requests_of_the_connection(engine, proxy, dial):
    asked = threading.Event()

    async def script(line):
        await line.request()
        asked.set()
        await engine.until_gone(line)

    engine.script = script
    sock = dial(proxy.port)
    sock.sendall((HEAD + b"Content-Length: 2\r\n\r\n{}") * 3)
    assert asked.wait(10)
    sock.close()

    assert engine.saw_disconnect.wait(10)
    assert len(engine.requests) == 1


# --- too slow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"POST", HEAD, HEAD + b"X: half a li", b"\r\n"])
def test_an_incomplete_head_times_out(engine, start_proxy, exchange_bytes, begun):
    proxy = start_proxy(engine.url, head_timeout_s=0.1)

    answer = exchange_bytes(proxy.port, begun)

    assert (status_of(answer), code_of(answer)) == (408, "head_timeout")
    assert refusal_log(proxy, "head_timeout") == 1


def test_a_silent_connection_is_closed_without_a_response(engine, start_proxy, exchange_bytes):
    proxy = start_proxy(engine.url, head_timeout_s=0.1)

    assert exchange_bytes(proxy.port, b"") == b""
    assert refusal_log(proxy, "head_timeout") == 0


def test_slow_bytes_do_not_extend_the_timeout(engine, start_proxy, dial):
    proxy = start_proxy(engine.url, head_timeout_s=0.2)
    sock = dial(proxy.port)
    sock.sendall(HEAD)
    sock.settimeout(0.02)
    dripped = 0
    while dripped < 2_000:
        sock.sendall(b"X")
        dripped += 1
        try:
            answer = sock.recv(1_000)
            break
        except TimeoutError:
            continue

    assert status_of(answer) == 408


def test_the_second_head_of_a_connection_has_a_timeout_too(engine, start_proxy, dial):
    proxy = start_proxy(engine.url, head_timeout_s=0.1)
    sock = dial(proxy.port)
    sock.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
    assert status_of(sock.recv(65_536)) == 200

    sock.sendall(b"POST /v1/comp")

    assert status_of(read_to_end(sock)) == 408


def test_the_start_of_a_request_does_not_cut_off_the_previous_response(engine, start_proxy, dial, background):
    proxy = start_proxy(engine.url, head_timeout_s=0.05)

    async def script(line):
        await line.request()
        thought = background.loop.create_future()
        background.loop.call_later(0.3, thought.set_result, None)
        await thought
        await line.answer(b"whole")

    engine.script = script
    sock = dial(proxy.port)
    sock.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}" + b"POST /v1/comp")

    first, _, second = read_to_end(sock).partition(b"whole")
    assert status_of(first) == 200
    assert status_of(second) == 408


def test_an_idle_connection_is_closed_after_its_timeout(engine, start_proxy, exchange_bytes):
    proxy = start_proxy(engine.url, idle_client_s=0.1)

    assert status_of(exchange_bytes(proxy.port, HEAD + b"Content-Length: 2\r\n\r\n{}")) == 200


def test_a_client_that_reads_nothing_is_disconnected_and_frees_the_engine(engine, start_proxy, dial):
    proxy = start_proxy(engine.url, send_timeout_s=0.1)

    async def script(line):
        await line.request()
        await line.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await line.send(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    engine.script = script
    dial(proxy.port).sendall(WHOLE)

    assert engine.saw_disconnect.wait(10)
    assert refusal_log(proxy, "send_timeout") == 1


# --- too many -------------------------------------------------------------------------------------


def test_a_connection_over_the_limit_is_refused_until_another_one_ends(engine, start_proxy, dial, exchange_bytes):
    proxy = start_proxy(engine.url, max_connections=2)
    held = [dial(proxy.port) for _ in range(2)]
    for sock in held:
        sock.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
        assert status_of(sock.recv(65_536)) == 200

    refused = exchange_bytes(proxy.port, b"")
    held[0].sendall(WHOLE)
    read_to_end(held[0])
    served = exchange_bytes(proxy.port, WHOLE)

    assert (status_of(refused), code_of(refused)) == (503, "too_many_connections")
    assert b"\r\nretry-after: 1\r\n" in refused
    assert status_of(served) == 200


# --- upgrade offers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offer",
    [
        OFFER,
        OFFER.replace(b"Connection: Upgrade, HTTP2-Settings", b"Connection: HTTP2-Settings,uPGRADE"),
        b"Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade: TLS/1.3\r\nUpgrade: h2c\r\n",
        b"Connection: \tUpgrade \t , x\r\nUpgrade:\r\n",
    ],
)
@pytest.mark.parametrize(
    "framed",
    [
        (b"Content-Length: 7\r\n\r\n", b'{"a":1}'),
        (b"Transfer-Encoding: chunked\r\n\r\n", b'7\r\n{"a":1}\r\n0\r\n\r\n'),
    ],
)
@pytest.mark.parametrize("is_in_pieces", [False, True])
def test_an_upgrade_offer_is_ignored_and_the_body_is_kept(engine, proxy, dial, offer, framed, is_in_pieces):
    head, body = framed
    sock = dial(proxy.port)
    sock.sendall(HEAD + offer + head + (b"" if is_in_pieces else body))
    if is_in_pieces:
        sock.sendall(body)
    first = sock.recv(65_536)
    sock.sendall(WHOLE)

    assert status_of(first) == 200
    assert status_of(read_to_end(sock)) == 200
    assert [request.body for request in engine.requests] == [b'{"a":1}', b"{}"]
    assert engine.requests[0].names == {b"host", b"content-length"}


def test_a_request_in_the_body_of_an_upgrade_offer_stays_a_body(engine, proxy, exchange_bytes):
    hidden = b"GET /v1/smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
    exchange_bytes(
        proxy.port,
        HEAD + OFFER.replace(b"Upgrade,", b"Upgrade, close,") + b"Content-Length: %d\r\n\r\n" % len(hidden) + hidden,
    )

    assert [request.body for request in engine.requests] == [hidden]


def test_a_tunnel_is_refused(engine, proxy, exchange_bytes):
    answer = exchange_bytes(proxy.port, b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: h\r\n\r\n")

    assert (status_of(answer), code_of(answer)) == (501, "method")
    assert engine.connections == 0


# --- trailers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trailers", [b"Authorization: Bearer k\r\n", b"X-A: 1\r\nAuthorization: Bearer k\r\n"])
def test_a_trailer_never_becomes_a_header(engine, proxy, dial, trailers):
    chunked = HEAD + b"Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n1\r\nx\r\n0\r\n"
    sock = dial(proxy.port)
    sock.sendall(chunked + trailers + b"\r\n")
    assert status_of(sock.recv(65_536)) == 200
    sock.sendall(WHOLE)

    assert status_of(read_to_end(sock)) == 200
    # Neither of its own request nor of the next one on the connection.
    assert [request.names for request in engine.requests] == [{b"host", b"content-length"}] * 2


def test_a_trailer_does_not_reach_the_next_pipelined_request(engine, proxy, dial):
    sock = dial(proxy.port)
    sock.sendall(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nAuthorization: Bearer k\r\n\r\n" + WHOLE,
    )
    read_to_end(sock)

    assert all(request.names == {b"host", b"content-length"} for request in engine.requests)


# --- malformed requests ---------------------------------------------------------------------------


@pytest.mark.parametrize("line", [b"X: a\x00b", b"X: a\x01b", b"X\x00: a", b"X: a\rb", b"X y: a", b": a", b"X"])
def test_a_header_with_invalid_characters_is_refused(engine, proxy, exchange_bytes, line):
    answer = exchange_bytes(proxy.port, HEAD + line + b"\r\nContent-Length: 2\r\n\r\n{}")

    assert (status_of(answer), code_of(answer)) == (400, "bad_request")
    assert engine.requests == []


@pytest.mark.parametrize("name", [b"Host", b"Authorization", b"authorization", b"Content-Type"])
@pytest.mark.parametrize("path", [b"/v1/completions", b"/tokenize", b"/health"])
def test_a_repeated_header_that_must_be_unique_is_refused(engine, proxy, exchange_bytes, name, path):
    answer = exchange_bytes(
        proxy.port,
        WHOLE.replace(b"/v1/completions", path).replace(b"\r\n\r\n", b"\r\n%s: a\r\n%s: b\r\n\r\n" % (name, name)),
    )

    assert (status_of(answer), code_of(answer)) == (400, "repeated_header")
    assert engine.requests == []


@pytest.mark.parametrize("broken", [b"zz\r\n", b"1\r\nxy\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n"])
def test_a_body_with_broken_framing_is_refused_at_once(engine, proxy, exchange_bytes, broken):
    answer = exchange_bytes(proxy.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n" + broken)

    assert (status_of(answer), code_of(answer)) == (400, "bad_request")
    assert engine.requests == []
