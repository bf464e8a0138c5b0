"""With `--tenants` no client can reach another tenant's data, whatever it sends; without it nothing is rewritten."""

from __future__ import annotations

import json

import pytest

from tests.harness.tenancy import SECRET, TENANTS, prefix_of
from tests.unit.proxy.scoping import ALICE, ALICES, BOB, dict_of, send
from tokencake_proxy.errors import Refusal


def salt_in(request):
    return json.loads(request.body)["cache_salt"]


# --- cached prefixes ------------------------------------------------------------------------------


def test_each_tenant_has_its_own_cached_prefixes():
    one, same, other = send({"prompt": "x"}), send({"prompt": "y"}), send({"prompt": "x"}, BOB)

    assert salt_in(one) == salt_in(same) != salt_in(other)
    assert TENANTS.prefix_from_salt(salt_in(one)) == ALICES


def test_a_clients_own_salt_still_separates_and_never_matches_another_tenant():
    own, none = send({"cache_salt": "mine"}), send({"cache_salt": None})
    stolen = send({"cache_salt": salt_in(own)}, BOB)

    assert len({salt_in(request) for request in (own, none, stolen, send({"cache_salt": "mine"}, BOB))}) == 4
    assert salt_in(none) == salt_in(send({}))
    assert TENANTS.prefix_from_salt(salt_in(stolen)) == prefix_of("bob's key")


@pytest.mark.parametrize("salt", [7, ["x"], {"x": 1}, True])
def test_an_invalid_salt_is_left_for_the_engine_to_reject(salt):
    assert salt_in(send({"cache_salt": salt})) == salt


def test_a_salt_is_valid_for_vllm():
    salt = salt_in(send({"cache_salt": "x" * 500 + "/@\\"}))

    assert len(salt) <= 128
    assert not set(salt) & set("@/\\\0")


def test_tenants_that_trust_each_other_share_prefixes():
    request = send({"prompt": "x"}, shares_prefixes=True)

    assert "cache_salt" not in json.loads(request.body)
    assert salt_in(send({"cache_salt": "ours"}, shares_prefixes=True)) == "ours"


@pytest.mark.parametrize("route", ["tokenize", "detokenize"])
def test_routes_that_compute_nothing_get_no_salt(route):
    assert "cache_salt" not in json.loads(send({"prompt": "x"}, route=route).body)


# --- other ways to reach another tenant -----------------------------------------------------------


def test_members_that_bypass_the_scheduler_are_removed():
    bypassing = {
        "priority": -9,
        "data_parallel_rank": 0,
        "kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1]},
        "ec_transfer_params": {"x": 1},
    }
    body = {**bypassing, "vllm_xargs": {**bypassing, "mine": 1}, "sampling_params": {"extra_args": dict(bypassing)}}
    headers = [
        *ALICE,
        (b"x-vllm-priority", b"-5"),
        (b"x-data-parallel-rank", b"0"),
        (b"endpoint-load-metrics-format", b"json"),
    ]

    request = send(body, headers)

    found = json.loads(request.body)
    assert (found["vllm_xargs"], found["sampling_params"]) == ({"mine": 1}, {"extra_args": {}})
    assert not bypassing.keys() & found.keys()
    assert request.headers == ALICE


def test_session_ids_are_scoped_like_those_of_hints():
    request = send(
        {"session_id": "s", "vllm_xargs": {"session_id": "s"}},
        [*ALICE, (b"x-session-id", prefix_of("bob's key").encode() + b"s")],
    )

    found = json.loads(request.body)
    assert found["session_id"] == found["vllm_xargs"]["session_id"] == ALICES + "s"
    assert dict(request.headers)[b"x-session-id"].decode() == ALICES + prefix_of("bob's key") + "s"


def test_a_request_id_is_unique_to_the_tenant_and_does_not_reveal_its_prefix():
    calls = [send({"request_id": "r"}, [*headers, (b"x-request-id", b"r")]) for headers in (ALICE, BOB)]

    ids = [json.loads(request.body)["request_id"] for request in calls]
    assert ids == [dict(request.headers)[b"x-request-id"].decode() for request in calls]
    assert ids[0] != ids[1]
    assert all(one.startswith("r-") for one in ids)
    assert ALICES.removesuffix("::") not in ids[0]


@pytest.mark.parametrize(
    "spelled", ['"uuid"', r'"\u0075uid"', r'"u\u0075\u0069\u0064" '], ids=["plain", "one escape", "escapes"]
)
def test_names_of_media_are_unique_to_the_tenant(spelled):
    part = f'{{"type": "image_url", "image_url": null, {spelled}: "logo"}}'
    body = f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": "hi"}}, {part}]}}]}}'

    names = [
        json.loads(send(body.encode(), headers).body)["messages"][0]["content"][1]["uuid"] for headers in (ALICE, BOB)
    ]

    assert names[0] != names[1]
    assert all(name.startswith("logo-") for name in names)


def test_media_nested_deeper_than_any_engine_reads_are_refused():
    part = {"type": "image_url", "uuid": "x"}
    for _ in range(10):
        part = {"content": [part]}

    with pytest.raises(Refusal) as refused:
        send({"messages": [part]})

    assert refused.value.code == "nesting"


def test_claimed_hashes_of_media_are_unique_to_the_tenant():
    features = {"mm_hashes": {"image": ["h", None]}, "kwargs_data": None}

    found = [json.loads(send({"features": features}, headers).body)["features"] for headers in (ALICE, BOB)]

    assert found[0]["mm_hashes"]["image"][0] != found[1]["mm_hashes"]["image"][0]
    assert found[0]["mm_hashes"]["image"][1] is None
    assert found[0]["kwargs_data"] is None


def test_a_uuid_in_a_tool_or_in_text_is_not_renamed():
    tools = [{"type": "function", "function": {"parameters": {"properties": {"uuid": {"type": "string"}}}}}]
    messages = [{"role": "assistant", "content": '{"uuid": "x"}', "tool_calls": [{"input": {"uuid": "x"}}]}]

    found = json.loads(send({"tools": tools, "messages": messages}).body)

    assert (found["tools"], found["messages"]) == (tools, messages)


def respond(headers=ALICE, **body):
    return send({"input": "x", **body}, headers, "responses", b"/v1/responses")


@pytest.mark.parametrize("body", [{}, {"request_id": "resp_known"}, {"request_id": None}])
def test_a_stored_response_is_available_to_its_tenant_only(body):
    name = json.loads(respond(**body).body)["request_id"]
    targets = [f"/v1/responses/{name}{rest}".encode() for rest in ("", "?stream=true", "/cancel")]

    for target in targets:
        assert send(b"", route="other_v1", target=target).target == target
        for sender, other in ((BOB, target), (ALICE, target.replace(name.encode(), b"resp_known"))):
            with pytest.raises(Refusal, match="not found") as refused:
                send(b"", sender, "other_v1", other)
            assert refused.value.status == 404
    assert json.loads(respond(previous_response_id=name).body)["previous_response_id"] == name
    with pytest.raises(Refusal, match="not found"):
        respond(BOB, previous_response_id=name)


def test_response_ids_are_unique_and_rendering_needs_none():
    names = {json.loads(respond().body)["request_id"] for _ in range(9)}
    assert len(names) == 9
    assert send({"input": "x"}, route="other_v1", target=b"/v1/responses/render").method == "POST"


@pytest.mark.parametrize("secret", [None, SECRET.encode()], ids=["one tenant", "tenants"])
def test_the_proxy_scopes_only_with_a_tenant_secret(engine, start_proxy, http, secret):
    proxy = start_proxy(engine.url, tenant_secret=secret)
    body = {"vllm_xargs": {"tokencake": '{"session": "s"}'}}

    http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=dict_of(ALICE))

    (received,) = engine.calls
    session = json.loads(json.loads(received.body)["vllm_xargs"]["tokencake"])["session"]
    assert session == (ALICES if secret else "") + "s"
    assert int(received.values(b"content-length")[0]) == len(received.body)


def test_a_long_body_is_scoped_and_arrives_complete(engine, start_proxy, http):
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
def test_metrics_need_the_operators_key_where_there_are_tenants(engine, start_proxy, http, settings, key, status):
    proxy = start_proxy(engine.url, **settings)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    assert http.get(f"{proxy.url}/metrics", headers=headers).status_code == status
