"""With `--tenants` no client can name what is another's, whatever it sends; without it nothing is touched."""

from __future__ import annotations

import json
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.tenancy import SECRET, TENANTS, mark_of, prefix_of
from tokencake import protocol
from tokencake.protocol import parse_events, parse_hint
from tokencake.protocol.tenancy import Tenants
from tokencake_proxy.errors import Refusal
from tokencake_proxy.event_budget import EventBudget
from tokencake_proxy.tenants import TenantScope
from tokencake_proxy.upstream import Call

ALICE = [(b"authorization", b"Bearer alice's key")]
BOB = [(b"authorization", b"Bearer bob's key")]
ALICES = prefix_of("alice's key")
HINT = {"session": "s", "call": "c", "app": "a", "parent_call": "p", "graph": "g", "join": "j", "agent": "writer"}
IDS = ("session", "call", "app", "parent_call", "graph", "join")
EVENTS = "tokencake_events"


def send(body, lines=ALICE, route="chat_completions", target=b"/v1/chat/completions", **options):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return TenantScope(TENANTS, **options).scoped(Call("POST", target, lines, text), route)


def send_events(events, lines=ALICE, target=b"/v1/tokencake/events"):
    body = events if isinstance(events, bytes) else {"v": 1, "events": events}
    return send(body, lines, EVENTS, target)


def hint_in(call, *path):
    found = json.loads(call.body)
    for name in path or ("vllm_xargs",):
        found = found[name]
    return json.loads(found["tokencake"])


def salt_in(call):
    return json.loads(call.body)["cache_salt"]


# --- hints ------------------------------------------------------------------------------------------


def test_ids_begin_with_the_tenant_and_the_rest_is_as_it_was():
    body = {"model": "m", "messages": [{"role": "user", "content": "tokencake"}], "temperature": 0.5}

    call = send({**body, "vllm_xargs": {"tokencake": json.dumps(HINT), "other": 1}})

    assert hint_in(call) == {**HINT, **{name: ALICES + HINT[name] for name in IDS}, "mark": mark_of("alice's key")}
    rest = {name: value for name, value in json.loads(call.body).items() if name not in ("vllm_xargs", "cache_salt")}
    assert rest == body
    assert json.loads(call.body)["vllm_xargs"]["other"] == 1


def test_a_client_with_another_key_is_another_tenant():
    scope = TenantScope(TENANTS)
    assert scope.prefix_of(ALICE) != scope.prefix_of(BOB)
    assert scope.prefix_of(ALICE) == scope.prefix_of([(b"authorization", b"bearer alice's key")]) == ALICES


@pytest.mark.parametrize("spelled", [b"Bearer alice's key  ", b"Bearer alice's key\t", b"bearer alice's key"])
def test_a_key_that_is_spelled_otherwise_makes_no_other_tenant(spelled):
    assert TenantScope(TENANTS).prefix_of([(b"authorization", spelled)]) == ALICES


def test_the_prefix_cannot_be_worked_out_from_the_key():
    assert TenantScope(Tenants(b"another proxy's secret")).prefix_of(ALICE) != ALICES


def test_a_prefix_or_a_mark_of_the_clients_own_makes_it_nobody_else():
    stolen = {"session": prefix_of("bob's key") + "session", "mark": mark_of("bob's key")}

    call = send({"vllm_xargs": {"tokencake": json.dumps(stolen)}})

    assert hint_in(call)["session"] == ALICES + stolen["session"]
    assert parse_hint(json.loads(call.body)["vllm_xargs"]["tokencake"], TENANTS).tenant == ALICES


def test_the_hint_of_vllms_own_generate_is_scoped_too():
    body = {"token_ids": [1], "sampling_params": {"n": 1, "extra_args": {"tokencake": '{"session": "s"}'}}}

    call = send(body, route="generate")

    assert hint_in(call, "sampling_params", "extra_args")["session"] == ALICES + "s"
    assert json.loads(call.body)["sampling_params"]["n"] == 1


def test_the_engine_reads_in_a_scoped_hint_what_the_client_said():
    text = json.dumps({**HINT, "expects_tools": {"検索": 1e6, "b": None}, "from_the_future": {"session": "s"}})

    scoped = json.loads(send({"vllm_xargs": {"tokencake": text}}).body)["vllm_xargs"]["tokencake"]

    assert parse_hint(scoped, TENANTS) == protocol.scoped(parse_hint(text), ALICES)


@pytest.mark.parametrize("text", ["{not json", "7", "[]", "null", '{"session": "%s"}' % ("x" * 20_000)])
def test_a_hint_that_is_none_or_too_long_is_void_here_as_at_the_engine(text):
    call = send({"vllm_xargs": {"tokencake": text}})

    assert json.loads(call.body)["vllm_xargs"]["tokencake"] == ""


def test_a_key_spelled_twice_or_in_escapes_is_what_the_engine_would_read():
    body = rb'{"vllm_xargs": {}, "vllm_xargs": {"\u0074okencake": "{\"session\": \"x\", \"session\": \"y\"}"}}'

    assert hint_in(send(body))["session"] == ALICES + "y"


def test_a_number_that_python_refuses_hides_no_hint():
    body = b'{"a":' + b"1" * 5_000 + b',"vllm_xargs":{"tokencake":"{\\"session\\":\\"s\\"}"}}'

    call = send(body)

    assert ALICES.encode() in call.body
    assert b"1" * 5_000 in call.body


@given(st.dictionaries(st.sampled_from(IDS), st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)))
def test_no_id_leaves_without_its_tenant(hint):
    found = hint_in(send({"vllm_xargs": {"tokencake": json.dumps(hint)}}))

    assert all(found[name] == ALICES + value for name, value in hint.items())


# --- what is scoped stands in the contract ------------------------------------------------------------


def test_every_id_of_every_event_is_scoped_nested_ones_too():
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

    call = send_events([protocol.to_wire(event) for event in events])

    sent = json.loads(call.body)["events"]
    for event, raw in zip(events, sent, strict=True):
        scoped = protocol.scoped(event, ALICES)
        assert raw == json.loads(json.dumps(protocol.to_wire(scoped)))
        assert scoped != event
    assert list(sent[-1]["joins"]) == [ALICES + "j"]
    assert parse_events(call.body, ALICES) == events


def test_events_are_scoped_each_and_so_is_what_comes_back():
    events = [{"type": "tool_start", "call": "c", "tool_call": "t", "tool": "x"}, {"type": "app_end", "app": "a"}, 7]

    call = send_events(events, target=b"/v1/tokencake/events?tenant=evil")

    sent = json.loads(call.body)["events"]
    assert (sent[0]["call"], sent[0]["tool_call"], sent[1]["app"], sent[2]) == (ALICES + "c", "t", ALICES + "a", 7)
    assert parse_qs(call.target.partition(b"?")[2].decode()) == {"tenant": [mark_of("alice's key")]}


def test_a_tenant_asks_for_its_own_records_only():
    target = b"/v1/tokencake/state?session=a%3A%3Ab&limit=5&tenant=evil&tenant=x&app=a"

    call = send(b"", route="tokencake_state", target=target)

    assert parse_qs(call.target.partition(b"?")[2].decode()) == {
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
def test_what_else_the_engine_tells_of_itself_is_not_for_tenants(target):
    with pytest.raises(Refusal) as refused:
        send(b"", route="other_v1", target=target)
    assert refused.value.status == 404


# --- what is legal directly is legal here -------------------------------------------------------------


def test_scoping_makes_no_legal_body_of_events_too_long():
    events = [{"type": "session_end", "session": "日本" * 60} for _ in range(660)]
    body = json.dumps({"v": 1, "events": events}, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(body) < protocol.MAX_BODY_BYTES < len(json.dumps(events))
    direct = parse_events(body)

    call = send_events(body)

    assert len(call.body) <= protocol.SCOPED_BODY_BYTES
    assert parse_events(call.body, ALICES) == direct


def test_scoping_makes_no_legal_graph_too_long():
    graph = {"type": "graph", "graph": "g", "nodes": {}, "edges": [], "joins": {chr(161 + n): [] for n in range(256)}}
    body = json.dumps({"v": 1, "events": [graph] * 120}, ensure_ascii=False, separators=(",", ":")).encode()
    assert protocol.MAX_BODY_BYTES // 2 < len(body) <= protocol.MAX_BODY_BYTES

    call = send_events(body)

    assert len(call.body) <= protocol.SCOPED_BODY_BYTES
    assert parse_events(call.body, ALICES) == parse_events(body)


def test_scoping_makes_no_legal_hint_and_no_legal_id_too_long():
    tools = {"検索ツール" * 6 + str(number): 1e6 for number in range(128)}
    hint = dict.fromkeys(IDS, "x" * protocol.MAX_ID_CHARS) | {"expects_tools": tools}
    text = json.dumps(hint, ensure_ascii=False, separators=(",", ":"))
    text += " " * (protocol.MAX_HINT_BYTES - len(text.encode()))
    direct = parse_hint(text)

    scoped = json.loads(send({"vllm_xargs": {"tokencake": text}}).body)["vllm_xargs"]["tokencake"]

    assert parse_hint(scoped, TENANTS) == protocol.scoped(direct, ALICES)


def test_a_body_of_events_that_is_too_long_directly_is_too_long_here():
    with pytest.raises(Refusal) as refused:
        send_events(b" " * (protocol.MAX_BODY_BYTES + 1))
    assert refused.value.status == 413


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_body_in_another_encoding_is_scoped_too(encoding):
    text = json.dumps({"vllm_xargs": {"tokencake": '{"session": "s"}'}})
    assert hint_in(send(text.encode(encoding)))["session"] == ALICES + "s"


def test_half_a_surrogate_pair_in_a_message_goes_on_as_it_was_spelled():
    body = (
        rb'{"messages": [{"role": "user", "content": "\ud83d"}], "vllm_xargs": {"tokencake": "{\"session\": \"s\"}"}}'
    )

    call = send(body)

    assert rb"\ud83d" in call.body
    assert hint_in(call)["session"] == ALICES + "s"


def test_members_that_are_not_concerned_keep_their_bytes():
    body = '{"messages" : [ {"content":"é \\u00e9 \\/", "n": 1e5} ],"n":1.0}'.encode()

    call = send(body)

    assert '"messages":[ {"content":"é \\u00e9 \\/", "n": 1e5} ],"n":1.0,'.encode() in call.body


NAMES = st.text('aé日"\\/ \0\x7f', max_size=5)  # none that the proxy changes anything for
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
def test_an_engine_reads_in_any_body_what_the_client_wrote_in_it(body, is_ascii, indent):
    try:
        text = json.dumps(body, ensure_ascii=is_ascii, indent=indent).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can spell
        text = json.dumps(body).encode()

    found = json.loads(send(text).body)

    assert TENANTS.prefix_from_salt(found.pop("cache_salt")) == ALICES
    assert found == body


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b'[{"vllm_xargs": {}}]'])
def test_what_can_carry_nothing_goes_through_byte_for_byte(body):
    assert send(body).body == body


@pytest.mark.parametrize("body", [b'{"vllm_xargs": 7}', b'{"vllm_xargs": {"tokencake": {"session": "s"}}}', b"{}"])
def test_what_carries_no_hint_goes_through_byte_for_byte_where_prefixes_are_shared(body):
    assert send(body, shares_prefixes=True).body == body


def test_a_form_goes_through_byte_for_byte():
    form = b'--x\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n{"tokencake": "{}"}\r\n--x--\r\n'
    lines = [*ALICE, (b"content-type", b"multipart/form-data; boundary=x")]

    assert send(form, lines, route="other_v1", target=b"/v1/audio/transcriptions").body == form


@pytest.mark.parametrize("body", [b"{not json", b'{"a": 1}x', b'{"\\ud800": 1}', b"\xff\xff{}"])
def test_a_body_that_says_it_is_json_and_cannot_be_read_is_refused(body):
    with pytest.raises(Refusal, match="cannot be read as JSON") as refused:
        send(body, [*ALICE, (b"content-type", b"application/json")])
    assert refused.value.status == 400


@pytest.mark.parametrize("nested", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
def test_a_body_nested_too_deeply_is_refused(engine, start_proxy, http, nested):
    proxy = start_proxy(engine.url, tenant_secret=SECRET.encode())

    answer = http.post(f"{proxy.url}/v1/chat/completions", content=nested, headers=dict_of(ALICE))

    assert answer.status_code == 400
    assert engine.calls == []


# --- floods -------------------------------------------------------------------------------------------


def test_a_tenant_that_floods_the_engine_with_events_is_slowed_down_and_no_other(engine, start_proxy, http):
    proxy = start_proxy(engine.url, tenant_secret=SECRET.encode(), tenant_events_per_s=0.001, json_inline_bytes=1_000)
    events = {"v": 1, "events": [{"type": "session_end", "session": "s"}] * 600}

    def report(lines):
        return http.post(f"{proxy.url}/v1/tokencake/events", json=events, headers=dict_of(lines))

    first, second, other = report(ALICE), report(ALICE), report(BOB)

    assert (first.status_code, second.status_code, other.status_code) == (200, 429, 200)
    assert second.json()["error"]["code"] == "too_many_events"
    assert int(second.headers["retry-after"]) >= 199_000


def test_a_budget_of_events_fills_up_again_and_always_takes_one_whole_body():
    now = [0.0]
    budget = EventBudget(10.0, lambda: now[0])

    assert budget.take("a", protocol.MAX_EVENTS) == 0.0
    assert budget.take("a", 50) == pytest.approx(5.0)
    assert budget.take("b", 1) == 0.0
    now[0] = 5.0
    assert budget.take("a", 50) == 0.0
    now[0] = 1e6
    assert [budget.take("a", protocol.MAX_EVENTS), budget.take("a", 1)] == [0.0, pytest.approx(0.1)]


def test_strangers_take_no_memory_for_ever():
    budget = EventBudget(10.0, lambda: 0.0)
    for number in range(10_000):
        budget.take(str(number), 1)
    assert len(budget._left) < 5_000


# --- cached prefixes ----------------------------------------------------------------------------------


def test_prefixes_are_cached_for_each_tenant_alone():
    one, same, other = send({"prompt": "x"}), send({"prompt": "y"}), send({"prompt": "x"}, BOB)

    assert salt_in(one) == salt_in(same) != salt_in(other)
    assert TENANTS.prefix_from_salt(salt_in(one)) == ALICES


def test_a_salt_of_the_clients_own_still_parts_and_never_reaches_another():
    own, none = send({"cache_salt": "mine"}), send({"cache_salt": None})
    stolen = send({"cache_salt": salt_in(own)}, BOB)

    assert len({salt_in(call) for call in (own, none, stolen, send({"cache_salt": "mine"}, BOB))}) == 4
    assert salt_in(none) == salt_in(send({}))
    assert TENANTS.prefix_from_salt(salt_in(stolen)) == prefix_of("bob's key")


@pytest.mark.parametrize("salt", [7, ["x"], {"x": 1}, True])
def test_what_is_no_salt_is_left_to_the_engine_to_refuse(salt):
    assert salt_in(send({"cache_salt": salt})) == salt


def test_a_salt_is_one_that_vllm_takes():
    salt = salt_in(send({"cache_salt": "x" * 500 + "/@\\"}))

    assert len(salt) <= 128
    assert not set(salt) & set("@/\\\0")


def test_tenants_that_trust_each_other_share_prefixes():
    call = send({"prompt": "x"}, shares_prefixes=True)

    assert "cache_salt" not in json.loads(call.body)
    assert salt_in(send({"cache_salt": "ours"}, shares_prefixes=True)) == "ours"


@pytest.mark.parametrize("route", ["tokenize", "detokenize"])
def test_what_computes_nothing_gets_no_salt(route):
    assert "cache_salt" not in json.loads(send({"prompt": "x"}, route=route).body)


# --- what else reaches across -------------------------------------------------------------------------


def test_the_place_the_engine_and_the_kv_of_others_are_out_of_reach():
    reaching = {
        "priority": -9,
        "data_parallel_rank": 0,
        "kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1]},
        "ec_transfer_params": {"x": 1},
    }
    body = {**reaching, "vllm_xargs": {**reaching, "mine": 1}, "sampling_params": {"extra_args": dict(reaching)}}
    lines = [
        *ALICE,
        (b"x-vllm-priority", b"-5"),
        (b"x-data-parallel-rank", b"0"),
        (b"endpoint-load-metrics-format", b"json"),
    ]

    call = send(body, lines)

    found = json.loads(call.body)
    assert (found["vllm_xargs"], found["sampling_params"]) == ({"mine": 1}, {"extra_args": {}})
    assert not reaching.keys() & found.keys()
    assert call.lines == ALICE


def test_sessions_are_named_like_those_of_hints():
    call = send(
        {"session_id": "s", "vllm_xargs": {"session_id": "s"}},
        [*ALICE, (b"x-session-id", prefix_of("bob's key").encode() + b"s")],
    )

    found = json.loads(call.body)
    assert found["session_id"] == found["vllm_xargs"]["session_id"] == ALICES + "s"
    assert dict(call.lines)[b"x-session-id"].decode() == ALICES + prefix_of("bob's key") + "s"


def test_a_request_id_is_the_tenants_own_and_tells_nothing_of_its_prefix():
    calls = [send({"request_id": "r"}, [*lines, (b"x-request-id", b"r")]) for lines in (ALICE, BOB)]

    ids = [json.loads(call.body)["request_id"] for call in calls]
    assert ids == [dict(call.lines)[b"x-request-id"].decode() for call in calls]
    assert ids[0] != ids[1]
    assert all(one.startswith("r-") for one in ids)
    assert ALICES.removesuffix("::") not in ids[0]


@pytest.mark.parametrize(
    "spelled", ['"uuid"', r'"\u0075uid"', r'"u\u0075\u0069\u0064" '], ids=["plain", "one escape", "escapes"]
)
def test_media_that_a_client_names_are_its_tenants_own(spelled):
    part = f'{{"type": "image_url", "image_url": null, {spelled}: "logo"}}'
    body = f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": "hi"}}, {part}]}}]}}'

    names = [json.loads(send(body.encode(), lines).body)["messages"][0]["content"][1]["uuid"] for lines in (ALICE, BOB)]

    assert names[0] != names[1]
    assert all(name.startswith("logo-") for name in names)


def test_media_that_are_nested_beyond_what_any_engine_reads_are_refused():
    part = {"type": "image_url", "uuid": "x"}
    for _ in range(10):
        part = {"content": [part]}

    with pytest.raises(Refusal) as refused:
        send({"messages": [part]})

    assert refused.value.code == "nesting"


def test_media_that_a_client_claims_the_hash_of_are_its_tenants_own():
    features = {"mm_hashes": {"image": ["h", None]}, "kwargs_data": None}

    found = [json.loads(send({"features": features}, lines).body)["features"] for lines in (ALICE, BOB)]

    assert found[0]["mm_hashes"]["image"][0] != found[1]["mm_hashes"]["image"][0]
    assert found[0]["mm_hashes"]["image"][1] is None
    assert found[0]["kwargs_data"] is None


def test_an_uuid_in_a_tool_or_in_the_text_is_no_media():
    tools = [{"type": "function", "function": {"parameters": {"properties": {"uuid": {"type": "string"}}}}}]
    messages = [{"role": "assistant", "content": '{"uuid": "x"}', "tool_calls": [{"input": {"uuid": "x"}}]}]

    found = json.loads(send({"tools": tools, "messages": messages}).body)

    assert (found["tools"], found["messages"]) == (tools, messages)


def respond(lines=ALICE, **body):
    return send({"input": "x", **body}, lines, "responses", b"/v1/responses")


@pytest.mark.parametrize("body", [{}, {"request_id": "resp_known"}, {"request_id": None}])
def test_a_stored_response_is_its_tenants_own(body):
    name = json.loads(respond(**body).body)["request_id"]
    targets = [f"/v1/responses/{name}{rest}".encode() for rest in ("", "?stream=true", "/cancel")]

    for target in targets:
        assert send(b"", route="other_v1", target=target).target == target
        for stranger, other in ((BOB, target), (ALICE, target.replace(name.encode(), b"resp_known"))):
            with pytest.raises(Refusal, match="not found") as refused:
                send(b"", stranger, "other_v1", other)
            assert refused.value.status == 404
    assert json.loads(respond(previous_response_id=name).body)["previous_response_id"] == name
    with pytest.raises(Refusal, match="not found"):
        respond(BOB, previous_response_id=name)


def test_no_two_responses_have_one_id_and_rendering_needs_none():
    names = {json.loads(respond().body)["request_id"] for _ in range(9)}
    assert len(names) == 9
    assert send({"input": "x"}, route="other_v1", target=b"/v1/responses/render").method == "POST"


# --- over the wire ------------------------------------------------------------------------------------


def dict_of(lines):
    return {name.decode(): value.decode() for name, value in lines}


@pytest.mark.parametrize("secret", [None, SECRET.encode()], ids=["one tenant", "tenants"])
def test_the_proxy_scopes_only_when_it_is_told_to(engine, start_proxy, http, secret):
    proxy = start_proxy(engine.url, tenant_secret=secret)
    body = {"vllm_xargs": {"tokencake": '{"session": "s"}'}}

    http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=dict_of(ALICE))

    (received,) = engine.calls
    session = json.loads(json.loads(received.body)["vllm_xargs"]["tokencake"])["session"]
    assert session == (ALICES if secret else "") + "s"
    assert int(received.values(b"content-length")[0]) == len(received.body)


def test_a_long_body_is_scoped_by_another_thread_and_arrives_whole(engine, start_proxy, http):
    proxy = start_proxy(engine.url, tenant_secret=SECRET.encode())
    body = {"prompt": "x" * 2_000_000, "vllm_xargs": {"tokencake": '{"session": "s"}'}}

    answer = http.post(f"{proxy.url}/v1/completions", json=body, headers=dict_of(ALICE))

    (received,) = engine.calls
    assert answer.status_code == 200
    assert json.loads(received.body)["prompt"] == body["prompt"]
    assert ALICES.encode() in received.body


@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({}, None, 200),
        ({"tenant_secret": SECRET.encode()}, None, 401),
        ({"tenant_secret": SECRET.encode()}, "alice's key", 401),
        ({"tenant_secret": SECRET.encode(), "metrics_key": "operator"}, "alice's key", 401),
        ({"tenant_secret": SECRET.encode(), "metrics_key": "operator"}, "operator", 200),
        ({"metrics_key": "operator"}, None, 401),
    ],
)
def test_what_counts_everybodys_requests_is_the_operators(engine, start_proxy, http, settings, key, status):
    proxy = start_proxy(engine.url, **settings)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    assert http.get(f"{proxy.url}/metrics", headers=headers).status_code == status
