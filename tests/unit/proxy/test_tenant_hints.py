"""With `--tenants` the ids of each hint and event are scoped, whatever the client sends."""

from __future__ import annotations

import json
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.tenancy import SECRET, TENANTS, mark_of, prefix_of
from tests.unit.proxy.scoping import ALICE, ALICES, BOB, dict_of, send
from tokencake import protocol
from tokencake.protocol import parse_events, parse_hint
from tokencake.protocol.tenancy import Tenants
from tokencake_proxy.dialects import DIALECTS
from tokencake_proxy.errors import Refusal
from tokencake_proxy.tenants import TenantScope

HINT = {"session": "s", "call": "c", "app": "a", "parent_call": "p", "graph": "g", "join": "j", "agent": "writer"}
IDS = ("session", "call", "app", "parent_call", "graph", "join")
EVENTS = "tokencake_events"


def send_events(events, headers=ALICE, target=b"/v1/tokencake/events"):
    body = events if isinstance(events, bytes) else {"v": 1, "events": events}
    return send(body, headers, EVENTS, target)


def hint_in(request, *path):
    found = json.loads(request.body)
    for name in path or ("vllm_xargs",):
        found = found[name]
    return json.loads(found["tokencake"])


# --- hints ----------------------------------------------------------------------------------------


def test_ids_get_the_tenants_prefix_and_the_rest_is_unchanged():
    body = {"model": "m", "messages": [{"role": "user", "content": "tokencake"}], "temperature": 0.5}

    request = send({**body, "vllm_xargs": {"tokencake": json.dumps(HINT), "other": 1}})

    assert hint_in(request) == {**HINT, **{name: ALICES + HINT[name] for name in IDS}, "mark": mark_of("alice's key")}
    rest = {name: value for name, value in json.loads(request.body).items() if name not in ("vllm_xargs", "cache_salt")}
    assert rest == body
    assert json.loads(request.body)["vllm_xargs"]["other"] == 1


def test_a_client_with_another_key_is_another_tenant():
    scope = TenantScope(TENANTS)
    assert scope.prefix_of(ALICE) != scope.prefix_of(BOB)
    assert scope.prefix_of(ALICE) == scope.prefix_of([(b"authorization", b"bearer alice's key")]) == ALICES


@pytest.mark.parametrize("spelled", [b"Bearer alice's key  ", b"Bearer alice's key\t", b"bearer alice's key"])
def test_another_spelling_of_a_key_is_the_same_tenant(spelled):
    assert TenantScope(TENANTS).prefix_of([(b"authorization", spelled)]) == ALICES


def test_the_prefix_depends_on_the_proxys_secret():
    assert TenantScope(Tenants(b"another proxy's secret")).prefix_of(ALICE) != ALICES


def test_a_prefix_or_mark_in_the_clients_hint_gives_no_access_to_another_tenant():
    stolen = {"session": prefix_of("bob's key") + "session", "mark": mark_of("bob's key")}

    request = send({"vllm_xargs": {"tokencake": json.dumps(stolen)}})

    assert hint_in(request)["session"] == ALICES + stolen["session"]
    assert parse_hint(json.loads(request.body)["vllm_xargs"]["tokencake"], TENANTS).tenant == ALICES


@pytest.mark.parametrize("dialect", [one for one in DIALECTS if one.hint_path], ids=lambda one: one.name)
def test_a_hint_is_scoped_wherever_a_dialect_has_it(dialect):
    body = {"tokencake": '{"session": "s"}'}
    for name in reversed(dialect.hint_path):
        body = {name: body, "n": 1}

    request = send(body, route=dialect.name, target=dialect.path.encode())

    assert hint_in(request, *dialect.hint_path)["session"] == ALICES + "s"
    assert json.loads(request.body)["n"] == 1


def test_the_engine_reads_from_a_scoped_hint_what_the_client_sent():
    text = json.dumps({**HINT, "expects_tools": {"検索": 1e6, "b": None}, "from_the_future": {"session": "s"}})

    scoped = json.loads(send({"vllm_xargs": {"tokencake": text}}).body)["vllm_xargs"]["tokencake"]

    assert parse_hint(scoped, TENANTS) == protocol.scoped(parse_hint(text), ALICES)


@pytest.mark.parametrize("text", ["{not json", "7", "[]", "null", '{"session": "%s"}' % ("x" * 20_000)])
def test_a_malformed_or_too_long_hint_is_void(text):
    request = send({"vllm_xargs": {"tokencake": text}})

    assert json.loads(request.body)["vllm_xargs"]["tokencake"] == ""


def test_repeated_and_escaped_member_names_are_read_as_the_engine_reads_them():
    body = rb'{"vllm_xargs": {}, "vllm_xargs": {"\u0074okencake": "{\"session\": \"x\", \"session\": \"y\"}"}}'

    assert hint_in(send(body))["session"] == ALICES + "y"


def test_a_hint_beside_a_number_that_python_rejects_is_scoped():
    body = b'{"a":' + b"1" * 5_000 + b',"vllm_xargs":{"tokencake":"{\\"session\\":\\"s\\"}"}}'

    request = send(body)

    assert ALICES.encode() in request.body
    assert b"1" * 5_000 in request.body


@given(st.dictionaries(st.sampled_from(IDS), st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)))
def test_no_id_leaves_without_its_tenant(hint):
    found = hint_in(send({"vllm_xargs": {"tokencake": json.dumps(hint)}}))

    assert all(found[name] == ALICES + value for name, value in hint.items())


# --- the contract defines which fields are scoped -------------------------------------------------


def test_every_id_of_every_event_is_scoped_even_nested_ones():
    events = [
        protocol.ToolStart("c", "t", "search"),
        protocol.ToolProgress("c", "t"),
        protocol.ToolEnd("c", "t"),
        protocol.StallStart("s", "human"),
        protocol.StallEnd("s", "human"),
        protocol.SessionEnd("s"),
        protocol.AppEnd("a"),
        protocol.Graph("g", {"n": {}}, (("n", "n"),), {"j": ("n",)}),
    ]

    request = send_events([protocol.to_wire(event) for event in events])

    sent = json.loads(request.body)["events"]
    for event, raw in zip(events, sent, strict=True):
        scoped = protocol.scoped(event, ALICES)
        assert raw == json.loads(json.dumps(protocol.to_wire(scoped)))
        assert scoped != event
    assert list(sent[-1]["joins"]) == [ALICES + "j"]
    assert parse_events(request.body, ALICES) == events


def test_each_event_of_a_body_is_scoped_and_the_query_has_the_mark():
    events = [{"type": "tool_start", "call": "c", "tool_call": "t", "tool": "x"}, {"type": "app_end", "app": "a"}, 7]

    request = send_events(events, target=b"/v1/tokencake/events?tenant=evil")

    sent = json.loads(request.body)["events"]
    assert (sent[0]["call"], sent[0]["tool_call"], sent[1]["app"], sent[2]) == (ALICES + "c", "t", ALICES + "a", 7)
    assert parse_qs(request.target.partition(b"?")[2].decode()) == {"tenant": [mark_of("alice's key")]}


def test_a_tenant_can_query_only_its_own_records():
    target = b"/v1/tokencake/state?session=a%3A%3Ab&limit=5&tenant=evil&tenant=x&app=a"

    request = send(b"", route="tokencake_state", target=target)

    assert parse_qs(request.target.partition(b"?")[2].decode()) == {
        "session": [ALICES + "a::b"],
        "limit": ["5"],
        "tenant": [mark_of("alice's key")],
        "app": [ALICES + "a"],
    }


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/tokencake/steps",
        b"/v1/tokencake/state/",
        b"/v1/tokencake%2Fsteps?x",
        b"/v1//tokencake/state",
        b"/v1/TokenCake/steps",
        b"/v1/%74okencake/steps",
    ],
)
def test_the_engines_other_routes_are_refused_to_tenants(target):
    with pytest.raises(Refusal) as refused:
        send(b"", route="other_v1", target=target)
    assert refused.value.status == 404


# --- scoping makes no legal request illegal -------------------------------------------------------


def test_scoping_makes_no_legal_body_of_events_too_long():
    events = [{"type": "session_end", "session": "日本" * 60} for _ in range(660)]
    body = json.dumps({"v": 1, "events": events}, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(body) < protocol.MAX_BODY_BYTES < len(json.dumps(events))
    direct = parse_events(body)

    request = send_events(body)

    assert len(request.body) <= protocol.SCOPED_BODY_BYTES
    assert parse_events(request.body, ALICES) == direct


def test_scoping_makes_no_legal_graph_too_long():
    graph = {"type": "graph", "graph": "g", "nodes": {}, "edges": [], "joins": {chr(161 + n): [] for n in range(256)}}
    body = json.dumps({"v": 1, "events": [graph] * 120}, ensure_ascii=False, separators=(",", ":")).encode()
    assert protocol.MAX_BODY_BYTES // 2 < len(body) <= protocol.MAX_BODY_BYTES

    request = send_events(body)

    assert len(request.body) <= protocol.SCOPED_BODY_BYTES
    assert parse_events(request.body, ALICES) == parse_events(body)


def test_scoping_makes_no_legal_hint_and_no_legal_id_too_long():
    tools = {"検索ツール" * 6 + str(number): 1e6 for number in range(128)}
    hint = dict.fromkeys(IDS, "x" * protocol.MAX_ID_CHARS) | {"expects_tools": tools}
    text = json.dumps(hint, ensure_ascii=False, separators=(",", ":"))
    text += " " * (protocol.MAX_HINT_BYTES - len(text.encode()))
    direct = parse_hint(text)

    scoped = json.loads(send({"vllm_xargs": {"tokencake": text}}).body)["vllm_xargs"]["tokencake"]

    assert parse_hint(scoped, TENANTS) == protocol.scoped(direct, ALICES)


def test_a_body_of_events_over_the_limit_is_refused():
    with pytest.raises(Refusal) as refused:
        send_events(b" " * (protocol.MAX_BODY_BYTES + 1))
    assert refused.value.status == 413


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_body_in_another_encoding_is_scoped_too(encoding):
    text = json.dumps({"vllm_xargs": {"tokencake": '{"session": "s"}'}})
    assert hint_in(send(text.encode(encoding)))["session"] == ALICES + "s"


def test_a_lone_surrogate_in_a_message_is_forwarded_unchanged():
    body = (
        rb'{"messages": [{"role": "user", "content": "\ud83d"}], "vllm_xargs": {"tokencake": "{\"session\": \"s\"}"}}'
    )

    request = send(body)

    assert rb"\ud83d" in request.body
    assert hint_in(request)["session"] == ALICES + "s"


def test_unchanged_members_keep_their_bytes():
    body = '{"messages" : [ {"content":"é \\u00e9 \\/", "n": 1e5} ],"n":1.0}'.encode()

    request = send(body)

    assert '"messages":[ {"content":"é \\u00e9 \\/", "n": 1e5} ],"n":1.0,'.encode() in request.body


NAMES = st.text('aé日"\\/ \0\x7f', max_size=5)  # none of them is a member that the proxy rewrites
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


@given(
    st.dictionaries(NAMES | st.sampled_from(["messages", "input", "vllm_xargs", "features"]), JSON),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_the_engine_reads_from_any_body_what_the_client_wrote(body, is_ascii, indent):
    try:
        text = json.dumps(body, ensure_ascii=is_ascii, indent=indent).encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can express
        text = json.dumps(body).encode()

    found = json.loads(send(text).body)

    assert TENANTS.prefix_from_salt(found.pop("cache_salt")) == ALICES
    assert found == body


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b'[{"vllm_xargs": {}}]'])
def test_a_body_that_is_not_an_object_is_forwarded_byte_for_byte(body):
    assert send(body).body == body


@pytest.mark.parametrize("body", [b'{"vllm_xargs": 7}', b'{"vllm_xargs": {"tokencake": {"session": "s"}}}', b"{}"])
def test_a_body_without_a_hint_is_forwarded_byte_for_byte_if_prefixes_are_shared(body):
    assert send(body, shares_prefixes=True).body == body


def test_a_form_is_forwarded_byte_for_byte():
    form = b'--x\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n{"tokencake": "{}"}\r\n--x--\r\n'
    headers = [*ALICE, (b"content-type", b"multipart/form-data; boundary=x")]

    assert send(form, headers, route="other_v1", target=b"/v1/audio/transcriptions").body == form


@pytest.mark.parametrize("body", [b"{not json", b'{"a": 1}x', b'{"\\ud800": 1}', b"\xff\xff{}"])
def test_a_body_declared_as_json_that_cannot_be_parsed_is_refused(body):
    with pytest.raises(Refusal, match="cannot be read as JSON") as refused:
        send(body, [*ALICE, (b"content-type", b"application/json")])
    assert refused.value.status == 400


@pytest.mark.parametrize("nested", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
def test_a_body_nested_too_deeply_is_refused(engine, start_proxy, http, nested):
    proxy = start_proxy(engine.url, tenant_secret=SECRET.encode())

    answer = http.post(f"{proxy.url}/v1/chat/completions", content=nested, headers=dict_of(ALICE))

    assert answer.status_code == 400
    assert engine.calls == []
