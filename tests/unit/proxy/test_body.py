"""Request bodies have bounded memory and time, each and together."""

from __future__ import annotations

import json
import threading
import time

import pytest

from tokencake_proxy.body import BodyBudget, RequestBody
from tokencake_proxy.errors import Refusal
from tokencake_proxy.settings import ProxySettings

PATIENCE_S = 10
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def head(length, *lines):
    return b"\r\n".join([b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d" % length, *lines, b"\r\n"])


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def code_of(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


# --- all together ---------------------------------------------------------------------------------


@pytest.fixture
def scarce(engine, start_proxy):
    """A proxy that holds two bodies of 40,000 bytes for one key, and not three."""
    return start_proxy(engine.url, max_bodies_bytes=200_000, max_body_bytes=100_000)


def test_bodies_over_the_budget_are_refused_until_memory_is_free(engine, scarce, dial, exchange_bytes, background):
    may_answer = threading.Event()

    async def script(line):
        while await line.request() is not None:
            await background.loop.run_in_executor(None, may_answer.wait, PATIENCE_S)
            await line.answer()

    engine.script = script
    body = b"x" * 40_000
    held = [dial(scarce.port) for _ in range(2)]
    for sock in held:
        sock.sendall(head(len(body)) + body)
    deadline_s = time.monotonic() + PATIENCE_S
    while len(engine.requests) < 2:
        assert time.monotonic() < deadline_s
    refused = exchange_bytes(scarce.port, head(len(body), b"Connection: close") + body)
    may_answer.set()
    for sock in held:
        assert status_of(sock.recv(65_536)) == 200

    assert (status_of(refused), code_of(refused)) == (503, "bodies_full")
    assert b"\r\nretry-after: 1\r\n" in refused
    assert status_of(exchange_bytes(scarce.port, head(len(body), b"Connection: close") + body)) == 200
    assert scarce.metric("tokencake_proxy_refusals_total", reason="bodies_full") == 1


def test_bodies_that_are_still_arriving_count_too(scarce, dial, exchange_bytes):
    for _ in range(2):
        dial(scarce.port).sendall(head(40_001) + b"x" * 40_000)
    refused = b""
    deadline_s = time.monotonic() + PATIENCE_S
    while b"bodies_full" not in refused:  # the proxy may not have read the first two yet
        assert time.monotonic() < deadline_s
        refused = exchange_bytes(scarce.port, head(40_000, b"Connection: close") + b"x" * 40_000)

    assert status_of(refused) == 503


def test_the_part_of_a_body_that_was_refused_does_not_count(scarce, exchange_bytes):
    chunk = b"9c40\r\n" + b"x" * 40_000 + b"\r\n"
    framing = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(5):
        answer = exchange_bytes(
            scarce.port, b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n" + framing + chunk * 3 + b"0\r\n\r\n"
        )
        assert status_of(answer) == 413


def test_the_part_of_a_body_of_a_disconnected_client_does_not_count(scarce, dial, exchange_bytes):
    for number in range(1, 6):
        sock = dial(scarce.port)
        sock.sendall(head(90_001) + b"x" * 90_000)
        sock.close()
        deadline_s = time.monotonic() + PATIENCE_S
        while scarce.metric("tokencake_proxy_client_disconnects_total", phase="upload") < number:
            assert time.monotonic() < deadline_s
    body = b"x" * 90_000

    assert status_of(exchange_bytes(scarce.port, head(len(body), b"Connection: close") + body)) == 200


def test_a_body_does_not_count_while_its_answer_streams(engine, scarce, dial, exchange_bytes):
    async def script(line):
        await line.request()
        await line.send(SSE_HEAD)
        await engine.until_gone(line)

    engine.script = script
    body = b"x" * 90_000
    for _ in range(5):
        sock = dial(scarce.port)
        sock.sendall(head(len(body), b"X-A: 1") + body)
        assert status_of(sock.recv(65_536)) == 200


@pytest.fixture
def budget():
    return BodyBudget(ProxySettings("http://h", max_body_bytes=10, max_bodies_bytes=120))


def fill(budget, key):
    """Bytes that one key gets."""
    for count in range(1_000):
        try:
            budget.hold(key, 1)
        except Refusal:
            budget.hold(key, -1)
            return count
    raise AssertionError


def test_each_key_gets_half_of_what_is_free(budget):
    assert [fill(budget, key) for key in (b"alice", b"bob", b"carol", None)] == [60, 30, 15, 7]


def test_released_bytes_are_free_for_all_keys(budget):
    fill(budget, b"alice")
    budget.hold(b"alice", -60)

    assert budget.held_bytes == 0
    assert not budget._held_bytes_by_key
    assert fill(budget, b"bob") == 60


def test_a_body_is_counted_once_and_released_once(budget):
    first, second = RequestBody(budget, b"alice"), RequestBody(budget, b"alice")
    first._add(8)
    with pytest.raises(Refusal):
        second._add(60)
    second.release()
    second.release()
    first.release()

    assert budget.held_bytes == 0


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [head(10), head(10) + b"x", head(10_000_000) + b"x" * 100_000])
def test_an_incomplete_body_times_out(engine, start_proxy, exchange_bytes, begun):
    proxy = start_proxy(engine.url, upload_timeout_s=0.1)

    answer = exchange_bytes(proxy.port, begun)

    assert (status_of(answer), code_of(answer)) == (408, "upload_timeout")
    assert engine.calls == []
    assert proxy.metric("tokencake_proxy_refusals_total", reason="upload_timeout") == 1


def test_slow_bytes_do_not_extend_the_timeout(engine, start_proxy, dial):
    proxy = start_proxy(engine.url, upload_timeout_s=0.2)
    sock = dial(proxy.port)
    sock.sendall(head(10_000))
    sock.settimeout(0.02)
    answer = b""
    for _ in range(2_000):
        sock.sendall(b"x")
        try:
            answer = sock.recv(1_000)
            break
        except TimeoutError:
            continue

    assert status_of(answer) == 408


def test_a_response_may_take_longer_than_the_upload_timeout(engine, start_proxy, http, background):
    proxy = start_proxy(engine.url, upload_timeout_s=0.1, head_timeout_s=0.1)

    async def script(line):
        await line.request()
        thought = background.loop.create_future()
        background.loop.call_later(0.3, thought.set_result, None)
        await thought
        await line.answer()

    engine.script = script
    assert http.post(f"{proxy.url}/v1/completions", json={}).status_code == 200


# --- the rest of a refused body -------------------------------------------------------------------


def test_the_rest_of_a_refused_body_is_discarded_and_the_connection_stays_open(engine, start_proxy, dial):
    proxy = start_proxy(engine.url, max_body_bytes=1_000)
    sock = dial(proxy.port)
    sock.sendall(head(5_000_000) + b"x" * 5_000_000)
    assert status_of(sock.recv(65_536)) == 413
    sock.sendall(head(2) + b"{}")

    assert status_of(sock.recv(65_536)) == 200
    assert [request.body for request in engine.requests] == [b"{}"]


def test_waiting_for_the_rest_of_a_refused_body_times_out(engine, start_proxy, exchange_bytes):
    proxy = start_proxy(engine.url, max_body_bytes=1_000, head_timeout_s=0.1)

    assert status_of(exchange_bytes(proxy.port, head(5_000_000) + b"x" * 100_000)) == 413
