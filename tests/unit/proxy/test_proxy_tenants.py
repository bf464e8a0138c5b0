"""With `--tenants` no client can name what is another's, whatever it sends; without it nothing is touched."""

from __future__ import annotations

import json
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake_proxy.tenants import MARK, scoped, tenant_of
from tokencake_proxy.upstream import Call

ALICE = [(b"authorization", b"Bearer alice's key")]
BOB = [(b"authorization", b"Bearer bob's key")]
HINT = {"session": "s", "call": "c", "app": "a", "parent_call": "p", "graph": "g", "join": "j", "agent": "writer"}


def send(body, lines=ALICE, route="chat_completions", target=b"/v1/chat/completions"):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return scoped(Call("POST", target, lines, text), route)


def hint_in(call, *path):
    found = json.loads(call.body)
    for name in path or ("vllm_xargs",):
        found = found[name]
    return json.loads(found["tokencake"])


def test_ids_begin_with_the_tenant_and_the_rest_is_as_it_was():
    alice = tenant_of(ALICE)
    body = {"model": "m", "messages": [{"role": "user", "content": "tokencake"}], "temperature": 0.5}

    call = send({**body, "vllm_xargs": {"tokencake": json.dumps(HINT), "other": 1}})

    assert hint_in(call) == {
        **HINT,
        **{name: alice + HINT[name] for name in ("session", "call", "app", "parent_call", "graph")},
    }
    assert {name: value for name, value in json.loads(call.body).items() if name != "vllm_xargs"} == body
    assert json.loads(call.body)["vllm_xargs"]["other"] == 1


def test_a_client_with_another_key_is_another_tenant():
    assert tenant_of(ALICE) != tenant_of(BOB)
    assert tenant_of(ALICE) == tenant_of([(b"authorization", b"bearer alice's key")])
    assert "alice" not in tenant_of(ALICE)


def test_a_mark_of_the_clients_own_makes_it_nobody_else():
    victim = tenant_of(BOB) + "session"

    call = send({"vllm_xargs": {"tokencake": json.dumps({"session": victim})}})

    assert hint_in(call)["session"].partition(MARK)[0] + MARK == tenant_of(ALICE)


def test_the_hint_of_vllms_own_generate_is_scoped_too():
    body = {"token_ids": [1], "sampling_params": {"extra_args": {"tokencake": '{"session": "s"}'}}}

    call = send(body, route="generate")

    assert hint_in(call, "sampling_params", "extra_args")["session"] == tenant_of(ALICE) + "s"


@pytest.mark.parametrize(
    "body", [b"", b"{not json", b"[]", b"7", b'{"vllm_xargs": 7}', b'{"vllm_xargs": {"tokencake": {"session": "s"}}}']
)
def test_what_carries_no_hint_goes_through_byte_for_byte(body):
    assert send(body).body == body


@pytest.mark.parametrize("text", ["{not json", "7", "[]", "null"])
def test_a_hint_that_cannot_be_read_is_void_here_as_at_the_engine(text):
    call = send({"vllm_xargs": {"tokencake": text}})

    assert json.loads(call.body)["vllm_xargs"]["tokencake"] == ""


def test_a_key_spelled_twice_or_in_escapes_is_what_the_engine_would_read():
    body = rb'{"vllm_xargs": {}, "vllm_xargs": {"\u0074okencake": "{\"session\": \"x\", \"session\": \"y\"}"}}'

    assert hint_in(send(body))["session"] == tenant_of(ALICE) + "y"


def test_events_are_scoped_each_and_so_is_what_comes_back():
    events = [{"type": "tool_start", "call": "c", "tool_call": "t", "tool": "x"}, {"type": "app_end", "app": "a"}, 7]

    call = send({"v": 1, "events": events}, route="tokencake_events", target=b"/v1/tokencake/events?tenant=evil")

    sent = json.loads(call.body)["events"]
    assert (sent[0]["call"], sent[0]["tool_call"], sent[1]["app"], sent[2]) == (
        tenant_of(ALICE) + "c",
        "t",
        tenant_of(ALICE) + "a",
        7,
    )
    assert parse_qs(call.target.partition(b"?")[2].decode()) == {"tenant": [tenant_of(ALICE)]}


def test_a_tenant_asks_for_its_own_records_only():
    target = b"/v1/tokencake/state?session=a%3A%3Ab&limit=5&tenant=evil&tenant=x"

    call = send(b"", route="tokencake_state", target=target)

    assert parse_qs(call.target.partition(b"?")[2].decode()) == {
        "session": [tenant_of(ALICE) + "a::b"],
        "limit": ["5"],
        "tenant": [tenant_of(ALICE)],
    }


@given(st.dictionaries(st.sampled_from(["session", "app", "call", "graph"]), st.text(min_size=1, max_size=30)))
def test_no_id_leaves_without_its_tenant(hint):
    found = hint_in(send({"vllm_xargs": {"tokencake": json.dumps(hint)}}))

    assert all(found[name] == tenant_of(ALICE) + value for name, value in hint.items())


def test_a_body_nested_too_deeply_is_refused(engine, start_proxy, http):
    proxy = start_proxy(engine.url, has_tenants=True)

    answer = http.post(f"{proxy.url}/v1/chat/completions", content=b"[" * 100_000 + b"]" * 100_000)

    assert answer.status_code == 400
    assert engine.calls == []


@pytest.mark.parametrize("has_tenants", [False, True])
def test_the_proxy_scopes_only_when_it_is_told_to(engine, start_proxy, http, has_tenants):
    proxy = start_proxy(engine.url, has_tenants=has_tenants)
    body = {"vllm_xargs": {"tokencake": '{"session": "s"}'}}

    http.post(f"{proxy.url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer alice's key"})

    (received,) = engine.calls
    session = json.loads(json.loads(received.body)["vllm_xargs"]["tokencake"])["session"]
    assert session == (tenant_of(ALICE) if has_tenants else "") + "s"
    assert int(received.values(b"content-length")[0]) == len(received.body)
