"""The proxy forwards, parses and reads long bodies only with a key that the engine accepts."""

from __future__ import annotations

import asyncio

import pytest

from tokencake_proxy.errors import Refusal
from tokencake_proxy.keys import ProvenKeys
from tokencake_proxy.routes import ROUTES, engine_checks_key

BY_THE_PROXY = [path for path in ROUTES if not path.startswith("/v1/")]
ALICE = {"Authorization": "Bearer alice"}
LARGE = b'{"prompt": "' + b"x" * 100_000 + b'"}'


@pytest.fixture
def engine(engine):
    engine.keys = [b"alice", b"bob"]
    engine.script = engine.demand_keys
    return engine


def asked(engine):
    """How often the proxy asked the engine whether a key is valid."""
    return len(engine.requests) - len(engine.calls)


# --- every route ----------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer mallory"}, {"Authorization": "alice"}])
@pytest.mark.parametrize("path", [*BY_THE_PROXY, "/v2/embed", "/v2/anything"])
def test_a_route_that_the_engine_leaves_open_needs_a_key_at_the_proxy(engine, proxy, http, path, headers):
    answer = http.post(f"{proxy.url}{path}", json={}, headers=headers)

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert engine.calls == []
    assert proxy.metric("tokencake_proxy_refusals_total", reason="invalid_api_key") == 1


@pytest.mark.parametrize("path", BY_THE_PROXY)
def test_such_a_route_passes_with_a_key(engine, proxy, http, path):
    assert http.post(f"{proxy.url}{path}", json={}, headers=ALICE).status_code == 200
    assert len(engine.calls) == 1


@pytest.mark.parametrize("path", BY_THE_PROXY)
def test_an_engine_without_keys_needs_none_at_the_proxy(start_engine, start_proxy, http, path):
    assert http.post(f"{start_proxy(start_engine().url).url}{path}", json={}).status_code == 200


def test_the_proxys_own_routes_need_no_key(engine, proxy, http):
    for path in ("/health", "/ping", "/metrics"):
        assert http.get(f"{proxy.url}{path}").status_code == 200


def test_under_v1_the_engine_itself_rejects_the_key(engine, proxy, http):
    answer = http.post(f"{proxy.url}/v1/completions", json={})

    assert (answer.status_code, answer.content) == (401, b'{"error":"Unauthorized"}')
    assert asked(engine) == 0


def test_only_a_cors_preflight_passes_without_a_key(engine, proxy, http):
    preflight = {"Origin": "http://app", "Access-Control-Request-Method": "POST"}

    assert http.options(f"{proxy.url}/tokenize", headers=preflight).status_code == 200
    assert http.options(f"{proxy.url}/tokenize", headers={"Origin": "http://app"}).status_code == 401
    assert http.request("OPTIONS", f"{proxy.url}/tokenize", headers=preflight, content=b"{}").status_code == 401
    assert http.options(f"{proxy.url}/v1/completions").status_code == 401
    assert not engine_checks_key("/v1/completions", "OPTIONS")


# --- large bodies ---------------------------------------------------------------------------------


def pieces():
    for _ in range(10):
        yield b"x" * 10_000


@pytest.mark.parametrize("content", [LARGE, "in pieces"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer mallory"}])
def test_a_large_body_without_a_valid_key_is_refused(engine, proxy, http, content, headers):
    answer = http.post(
        f"{proxy.url}/v1/completions", content=pieces() if content == "in pieces" else content, headers=headers
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert engine.calls == []


def test_a_large_body_is_refused_before_it_is_sent(engine, proxy, dial):
    sock = dial(proxy.port)
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 60000000\r\n\r\n"
    )

    assert sock.recv(1_000).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("content", [LARGE, "in pieces"])
def test_a_large_body_with_a_valid_key_passes_complete(engine, proxy, http, content):
    sent = b"".join(pieces()) if content == "in pieces" else content

    answer = http.post(
        f"{proxy.url}/v1/completions", content=pieces() if content == "in pieces" else content, headers=ALICE
    )

    assert answer.status_code == 200
    assert [request.body for request in engine.calls] == [sent]


def test_no_body_is_parsed_without_a_valid_key(engine, start_proxy, http):
    proxy = start_proxy(engine.url, tenant_secret=b"a secret of the tests")

    # Nested so deeply that a parser would answer 400.
    answer = http.post(f"{proxy.url}/v1/completions", content=b"[" * 60_000)

    assert answer.status_code == 401


# --- how a key is proven --------------------------------------------------------------------------


def test_the_engine_is_asked_once_for_many_calls(engine, proxy, http):
    for _ in range(3):
        http.post(f"{proxy.url}/tokenize", json={}, headers=ALICE)
        http.post(f"{proxy.url}/v1/completions", content=LARGE, headers=ALICE)

    assert asked(engine) == 1


def test_a_response_of_the_engine_proves_a_key(engine, proxy, http):
    http.post(f"{proxy.url}/v1/completions", json={}, headers=ALICE)

    assert http.post(f"{proxy.url}/tokenize", json={}, headers=ALICE).status_code == 200
    assert asked(engine) == 0


def test_a_proven_key_does_not_prove_another(engine, proxy, http):
    http.post(f"{proxy.url}/v1/completions", json={}, headers=ALICE)

    assert http.post(f"{proxy.url}/tokenize", json={}).status_code == 401
    assert http.post(f"{proxy.url}/tokenize", json={}, headers={"Authorization": "Bearer alic"}).status_code == 401


def test_a_key_that_the_engine_rejects_later_is_dropped(engine, proxy, http):
    http.post(f"{proxy.url}/v1/completions", json={}, headers=ALICE)
    engine.keys.remove(b"alice")
    http.post(f"{proxy.url}/v1/completions", json={}, headers=ALICE)

    assert http.post(f"{proxy.url}/tokenize", json={}, headers=ALICE).status_code == 401


def test_without_a_reachable_engine_no_key_is_proven(start_proxy, unused_port, http):
    proxy = start_proxy(f"http://127.0.0.1:{unused_port}")

    answer = http.post(f"{proxy.url}/tokenize", json={}, headers=ALICE)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unreachable")


@pytest.mark.parametrize("status", [b"500 Internal Server Error", b"429 Too Many Requests", b"307 Temporary Redirect"])
def test_without_a_clear_response_no_key_is_proven(engine, proxy, http, status):
    async def script(line):
        while await line.request() is not None:
            await line.answer(head=b"HTTP/1.1 " + status + b"\r\n")

    engine.script = script
    answer = http.post(f"{proxy.url}/tokenize", json={}, headers=ALICE)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_key_check")
    assert f"answered {status[:3].decode()}" in answer.json()["error"]["message"]
    assert engine.calls == []


def test_a_key_check_times_out(engine, start_proxy, http):
    async def script(line):
        await line.request()
        await engine.until_gone(line)

    engine.script = script
    answer = http.post(f"{start_proxy(engine.url, key_check_timeout_s=0.1).url}/tokenize", json={}, headers=ALICE)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_key_check")
    assert "key_check_timeout_s" in answer.json()["error"]["message"]


def test_a_key_check_on_a_stale_connection_is_retried(engine, proxy, http):
    async def script(line):
        await line.request()
        await line.answer()
        if line.number == 1:
            await line.reader.read(1)

    engine.script = script
    http.post(f"{proxy.url}/v1/completions", json={}, headers={"Authorization": "Bearer other"})

    assert http.post(f"{proxy.url}/tokenize", json={}, headers=ALICE).status_code == 200


# --- the memory of keys ---------------------------------------------------------------------------


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def lines(key):
    return [(b"authorization", b"Bearer " + key)]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(clock):
    async def accepts_key(lines):
        return lines != [] and lines[0][1].startswith(b"Bearer good")

    return ProvenKeys(accepts_key, ttl_s=60, clock=clock)


def test_a_proof_is_valid_for_its_ttl(keys, clock):
    asyncio.run(keys.prove(lines(b"good")))
    clock.now_s = 59
    assert keys.is_proven(lines(b"good"))
    clock.now_s = 60
    assert not keys.is_proven(lines(b"good"))


def test_further_calls_keep_a_key_proven(keys, clock):
    for clock.now_s in range(0, 1_000, 20):
        keys.learn(lines(b"good"), 200)
        assert keys.is_proven(lines(b"good"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejection_by_the_engine_ends_a_proof_at_once(keys, status):
    keys.learn(lines(b"good"), 200)
    keys.learn(lines(b"good"), status)

    assert not keys.is_proven(lines(b"good"))


@pytest.mark.parametrize("status", [302, 400, 404, 429, 500, 503])
def test_a_status_unrelated_to_the_key_changes_nothing(keys, status):
    keys.learn(lines(b"new"), status)
    keys.learn(lines(b"good"), 200)
    keys.learn(lines(b"good"), status)

    assert (keys.is_proven(lines(b"new")), keys.is_proven(lines(b"good"))) == (False, True)


def test_a_client_that_tries_many_keys_displaces_none(keys):
    async def many():
        await keys.prove(lines(b"good"))
        for number in range(10_000):
            with pytest.raises(Refusal):
                await keys.prove(lines(b"%d" % number))

    asyncio.run(many())

    assert keys.is_proven(lines(b"good"))
    assert len(keys._until_s) == 1


def test_the_memory_of_keys_is_bounded_and_drops_the_oldest(keys):
    for number in range(5_000):
        keys.learn(lines(b"%d" % number), 200)

    assert len(keys._until_s) == 4_096
    assert (keys.is_proven(lines(b"0")), keys.is_proven(lines(b"4999"))) == (False, True)


def test_keys_are_stored_as_digests_only(keys):
    keys.learn(lines(b"good"), 200)

    assert b"good" not in b"".join(keys._until_s)
