"""An engine whose proxy keeps tenants apart: what counts, what each tenant sees, and what it can do to another.

The proxy's own `TenantScope` writes what clients send; the engine is vLLM's scheduler with the plug-in and its routes.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import json
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from fastapi import FastAPI

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import StepLoop
from tests.harness.tenancy import TENANTS, mark_of, prefix_of
from tokencake import protocol
from tokencake_proxy.tenants import TenantScope
from tokencake_proxy.upstream import ForwardedRequest
from tokencake_vllm.api.routes import TokenCakeEndpoints

SPACE = {"enabled": True, "tenant_mark": "::", "decisions": 40}
LONG = 150


class World:
    """An engine, and clients that reach it through the proxy, each named like its key."""

    def __init__(self, scheduler: Any, space: dict[str, Any], *, shares_prefixes: bool = False) -> None:
        self.scheduler = scheduler
        self.steps = StepLoop(scheduler)
        self._scope = TenantScope(TENANTS, shares_prefixes=shares_prefixes)
        self._app = FastAPI()
        endpoints = TokenCakeEndpoints()
        endpoints.attach_router(self._app)
        core = SimpleNamespace(call_utility_all_async=self._call)
        args = Namespace(additional_config={"tokencake": {"space": space}})
        asyncio.run(endpoints.init_state(SimpleNamespace(engine_core=core), self._app.state, args))  # type: ignore[arg-type]
        self._made = 0

    async def _call(self, name: str, method: str, args: tuple[Any, ...]) -> list[Any]:
        assert name == "tokencake"
        return [getattr(self.scheduler, method)(*json.loads(json.dumps(args)))]  # as it crosses vLLM's RPC

    def _scoped(self, key: str, route: str, target: str, body: Any) -> ForwardedRequest:
        text = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = [(b"authorization", f"Bearer {key}".encode())]
        return self._scope.scoped(ForwardedRequest("POST", target.encode(), headers, text), route)

    def call(
        self, key: str, tokens: list[int], hint: dict[str, Any] | None = None, max_tokens: int = 4, **body: Any
    ) -> str:
        """A chat completion, as far as the scheduler is concerned."""
        if hint is not None:
            body["vllm_xargs"] = {"tokencake": json.dumps(hint)}
        sent = json.loads(self._scoped(key, "chat_completions", "/v1/chat/completions", body).body or b"{}")
        return self.direct(tokens, (sent.get("vllm_xargs") or {}).get("tokencake"), max_tokens, sent.get("cache_salt"))

    def direct(self, tokens: list[int], text: str | None, max_tokens: int = 4, salt: str | None = None) -> str:
        """A request by a way that the proxy has left as it is, or without the proxy."""
        self._made += 1
        name = f"r{self._made}"
        self.scheduler.add_request(make_request(name, tokens, text, max_tokens, salt))
        return name

    def _http(self, method: str, target: str, body: bytes | None = None) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
                return await client.request(method, target, content=body)

        return asyncio.run(ask())

    def tell(self, key: str, *events: dict[str, Any]) -> dict[str, Any]:
        call = self._scoped(key, "tokencake_events", protocol.EVENTS_PATH, {"v": 1, "events": events})
        answer = self._http("POST", call.target.decode(), call.body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def tell_directly(self, *events: dict[str, Any], query: str = "") -> httpx.Response:
        return self._http("POST", protocol.EVENTS_PATH + query, json.dumps({"v": 1, "events": events}).encode())

    def see(self, key: str | None, path: str, query: str = "") -> httpx.Response:
        """A view as the tenant sees it; as the operator does where `key` is None."""
        route = "tokencake_state" if path == protocol.STATE_PATH else "tokencake_decisions"
        target = path + query if key is None else self._scoped(key, route, path + query, None).target.decode()
        return self._http("GET", target)

    def state(self, key: str | None, query: str = "") -> dict[str, Any]:
        return dict(self.see(key, protocol.STATE_PATH, query).json())

    def decisions(self, key: str | None, query: str = "?limit=200") -> dict[str, Any]:
        return dict(self.see(key, protocol.DECISIONS_PATH, query).json())

    def outcomes(self, key: str, *events: dict[str, Any]) -> list[str]:
        return [result["outcome"] for result in self.tell(key, *events)["results"]]

    def hints(self) -> dict[str, int]:
        counts = self.scheduler.registry.counts
        return {key[1]: count for key, count in counts.items() if key[0] == "hints"}


@pytest.fixture
def world() -> Callable[..., World]:
    def make(num_blocks: int = 24, *, shares_prefixes: bool = False, **space: Any) -> World:
        settings = {**SPACE, "tenants_share_prefixes": shares_prefixes, **space}
        scheduler = build_scheduler(space=settings, num_blocks=num_blocks)
        return World(scheduler, settings, shares_prefixes=shares_prefixes)

    return make


def tokens(seed: int, count: int = LONG) -> list[int]:
    return [seed * 1_000 + number for number in range(count)]


def busy(world: World) -> None:
    """Calls of both tenants, more than fit at a time, all with names that the other must not see."""
    for number in range(6):
        for key in ("alice", "bob"):
            hint = {
                "session": f"{key}-session-{number}",
                "app": f"{key}-app-{number}",
                "call": f"{key}-call-{number}",
                "agent": f"{key}-agent",
                "graph": f"{key}-graph",
                "node": f"{key}-node",
                "critical": number == 5,
            }
            world.call(key, tokens(100 * number + len(key)), hint, max_tokens=30)
    world.steps.run()


# --- what counts --------------------------------------------------------------------------------------


def test_hints_count_with_the_proxys_mark_only_by_whichever_way_they_come(world: Any) -> None:
    here = world()
    forged = [
        '{"session": "s"}',
        json.dumps({"session": prefix_of("alice") + "s"}),
        json.dumps({"session": "0123456789abcdef::s", "mark": "0123456789abcdef::" + "0" * 32}),
        json.dumps({"session": prefix_of("alice") + "s", "mark": mark_of("bob")}),
    ]
    for number, text in enumerate(forged):
        here.direct(tokens(number), text)
    here.call("alice", tokens(9), {"session": "s"})

    assert here.hints() == {"unmarked": len(forged), "accepted": 1}
    assert list(here.scheduler.registry.sessions) == [prefix_of("alice") + "s"]


def test_events_count_with_the_proxys_mark_only(world: Any) -> None:
    here = world()
    here.call("alice", tokens(1), {"session": "s", "call": "c"})
    end = {"type": "session_end", "session": prefix_of("alice") + "s"}

    unmarked = here.tell_directly(end)

    assert unmarked.json()["results"][0]["outcome"] == "invalid"
    assert "tokencake proxy --tenants" in unmarked.json()["results"][0]["error"]
    assert here.tell_directly(end, query=f"?tenant={prefix_of('alice')}").status_code == 403
    assert here.tell_directly(end, query=f"?tenant={mark_of('alice')[:-1]}0").status_code == 403
    assert here.outcomes("bob", end, {"type": "session_end", "session": "s"}) == ["unknown", "unknown"]
    assert here.scheduler.registry.sessions[prefix_of("alice") + "s"].ended is None
    assert here.outcomes("alice", {"type": "session_end", "session": "s"}) == ["applied"]


def test_an_engine_that_knows_no_tenants_says_so_to_a_proxy_that_does(world: Any) -> None:
    here = world(tenant_mark=None)
    call = here._scoped("alice", "tokencake_events", protocol.EVENTS_PATH, {"v": 1, "events": []})

    assert here.see("alice", protocol.STATE_PATH).status_code == 501
    assert here._http("POST", call.target.decode(), call.body).status_code == 501
    assert "tenant_mark" in here.see("alice", protocol.DECISIONS_PATH).text


def test_a_secret_that_comes_later_counts_from_then_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    now = [100.0]
    monkeypatch.setattr("tokencake_vllm.tenant_secret.time.monotonic", lambda: now[0])
    monkeypatch.delenv("TOKENCAKE_TENANT_SECRET")
    monkeypatch.setenv("TOKENCAKE_TENANT_SECRET_FILE", str(tmp_path / "secret"))
    here = World(build_scheduler(space=SPACE), SPACE)
    here.call("alice", tokens(1), {"session": "s"})

    (tmp_path / "secret").write_text("the secret of the tests\n")
    here.call("alice", tokens(2), {"session": "s"})
    now[0] += 2.0
    here.call("alice", tokens(3), {"session": "s"})

    assert here.hints() == {"unmarked": 2, "accepted": 1}


def vllm_request(route: str, sent: dict[str, Any]) -> Any:
    """The request, and its sampling parameters, that vLLM itself makes of a body that the proxy has passed on."""
    module, name = VLLM_REQUESTS[route]
    request = getattr(importlib.import_module(f"vllm.entrypoints.{module}.protocol"), name).model_validate(sent)
    if route == "generate":
        return request, request.sampling_params
    if route == "messages":
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

        request = AnthropicServingMessages._build_base_request(request, [{"role": "user", "content": "x"}])
    return request, request.to_sampling_params(16, {})


VLLM_REQUESTS = {
    "chat_completions": ("openai.chat_completion", "ChatCompletionRequest"),
    "completions": ("openai.completion", "CompletionRequest"),
    "responses": ("openai.responses", "ResponsesRequest"),
    "messages": ("anthropic", "AnthropicMessagesRequest"),
    "generate": ("scale_out.token_in_token_out", "GenerateRequest"),
}
MESSAGES = [{"role": "user", "content": "x"}]
PROMPTS: dict[str, dict[str, Any]] = {
    "chat_completions": {"messages": MESSAGES},
    "completions": {"prompt": "x"},
    "responses": {"input": "x"},
    "messages": {"model": "m", "max_tokens": 4, "messages": MESSAGES},
    "generate": {"token_ids": [1]},
}


@pytest.mark.parametrize("route", VLLM_REQUESTS)
def test_vllm_takes_what_the_proxy_writes_and_hands_it_to_the_engine(world: Any, route: str) -> None:
    arguments = {"tokencake": '{"session": "s"}'}
    carrier = {"sampling_params": {"extra_args": arguments}} if route == "generate" else {"vllm_xargs": arguments}
    sent = json.loads(world()._scoped("alice", route, "/v1/x", {**PROMPTS[route], **carrier}).body)

    request, params = vllm_request(route, sent)

    assert TENANTS.prefix_from_salt(request.cache_salt) == prefix_of("alice")
    assert protocol.parse_hint(params.extra_args["tokencake"], TENANTS).session == prefix_of("alice") + "s"


def test_a_hint_in_a_form_reaches_the_engine_and_does_not_count(world: Any) -> None:
    """As in `/v1/audio/transcriptions`, whose body the proxy passes on as it is."""
    from fastapi import UploadFile
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest

    hint = json.dumps({"session": prefix_of("alice") + "s"})
    form = TranscriptionRequest(
        file=UploadFile(io.BytesIO(b"RIFF"), filename="a.wav"), model="w", vllm_xargs=json.dumps({"tokencake": hint})
    )
    text = (form.to_sampling_params(16, {}).extra_args or {})["tokencake"]
    here = world()
    here.direct(tokens(1), text)

    assert text == hint
    assert here.hints() == {"unmarked": 1}


# --- what a tenant sees ---------------------------------------------------------------------------------


def test_no_view_shows_a_tenant_a_name_or_a_number_of_another(world: Any) -> None:
    here = world()
    busy(here)
    for seen in (here.state("bob"), here.decisions("bob"), here.tell("bob", {"type": "session_end", "session": "x"})):
        text = json.dumps(seen)
        assert "alice" not in text
        for key in ("alice", "bob"):
            assert prefix_of(key).removesuffix("::") not in text
    kinds = {entry["kind"] for entry in here.decisions(None)["decisions"]}
    assert {"started", "waits", "refused"} <= kinds


def test_totals_are_the_tenants_own(world: Any) -> None:
    here = world(num_blocks=100)
    for number in range(3):
        here.call("alice", tokens(number), {"session": f"s{number}"})
    here.call("bob", tokens(9), {"session": "s0"})

    assert here.state("alice")["totals"] == {"sessions": 3, "calls": 3, "live_calls": 3}
    assert here.state("bob")["totals"] == {"sessions": 1, "calls": 1, "live_calls": 1}
    assert here.state("carol")["totals"] == {"sessions": 0, "calls": 0, "live_calls": 0}
    assert here.state(None)["totals"]["calls"] == 4


def test_blocks_are_the_tenants_own(world: Any) -> None:
    here = world(num_blocks=100)
    here.call("alice", tokens(1), {"session": "s"}, max_tokens=9)
    here.call("bob", tokens(2, 40), {"session": "s"}, max_tokens=9)
    here.call("bob", tokens(3, 20), max_tokens=9)  # without a hint it is known by its salt
    here.steps.step()

    own = {key: here.state(key)["kv_blocks"] for key in ("alice", "bob", "carol")}

    assert [blocks["running"] for blocks in own.values()] == [-(-LONG // 16), -(-40 // 16) + -(-20 // 16), 0]
    assert own["carol"] == {"running": 0, "loading": 0, "leaving": 0, "pinned": 0}
    assert sum(here.state(None)["kv_blocks"].values()) == 99


def test_the_longest_wait_is_the_tenants_own(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    here = world(num_blocks=100)
    here.call("alice", tokens(1), {"session": "s"})
    now[0] += 7.0
    here.call("bob", tokens(2), {"session": "s"})
    waiting = [here.decisions(key)["longest_wait_s"] for key in ("alice", "bob", None)]
    here.steps.step()
    now[0] += 5.0
    started = [here.decisions(key)["longest_wait_s"] for key in ("alice", "bob", None, "carol")]

    assert waiting == [7.0, 0.0, 7.0]
    assert started == [7.0, 0.0, 7.0, 0.0]


def test_a_call_that_waits_for_another_tenants_is_told_so_without_a_name(world: Any) -> None:
    here = world(num_blocks=12)
    for number in range(3):
        here.call("alice", tokens(number), {"session": f"s{number}", "app": f"a{number}"}, max_tokens=20)
        here.call("bob", tokens(10 + number), {"session": f"t{number}", "app": f"b{number}"}, max_tokens=20)
    here.steps.run()

    waits = [entry for entry in here.decisions("bob")["decisions"] if entry["words"].startswith("waits behind")]
    others = [entry for entry in waits if entry["behind"] is None]
    own = [entry for entry in waits if entry["behind"] is not None]

    assert others
    assert all("waits behind an application of another tenant (" in entry["words"] for entry in others)
    assert all(entry["words"].startswith(f"waits behind {entry['behind']} (") for entry in own)
    assert all("are free" not in entry["words"] for entry in here.decisions("bob")["decisions"])
    names = {entry["behind"] for entry in here.decisions(None)["decisions"]} - {None}
    assert any(name.startswith(prefix_of("alice")) for name in names)


def test_what_a_tenant_does_not_see_it_cannot_ask_for_either(world: Any) -> None:
    here = world(num_blocks=100)
    here.call("alice", tokens(1), {"session": "s", "app": "a", "call": "c"})
    for name in ("s", prefix_of("alice") + "s"):
        assert here.state("bob", f"?session={name}")["calls"] == []
    assert [call["call"] for call in here.state("alice", "?session=s&app=a")["calls"]] == ["c"]


# --- what a tenant can do to another ----------------------------------------------------------------------


def test_a_prompt_that_another_tenant_has_sent_looks_like_one_that_nobody_has(world: Any) -> None:
    here = world(num_blocks=100)
    secret = tokens(1)
    for key in ("alice", "alice", "bob", "bob"):
        here.call(key, secret, {"session": "s"})
        here.steps.run()
    cached = [call["cached_tokens"]["device"] for key in ("alice", "bob") for call in here.state(key)["calls"]]
    assert cached == [0, 144, 0, 144]


def test_what_comes_without_the_proxys_salt_reads_no_cached_prefix(world: Any) -> None:
    here = world(num_blocks=100)
    for salt in (None, "guessed", prefix_of("alice"), None):
        name = here.direct(tokens(1), None, salt=salt)
        here.steps.run()
        assert here.steps.computed(name) >= LONG


def test_tenants_that_trust_each_other_share_prefixes(world: Any) -> None:
    here = world(num_blocks=100, shares_prefixes=True)
    for key in ("alice", "bob"):
        here.call(key, tokens(1), {"session": "s"})
        here.steps.run()
    assert [call["cached_tokens"]["device"] for call in here.state("bob")["calls"]] == [144]


def test_one_tenants_graphs_push_out_none_of_another_and_are_asked_of_nobody_else(world: Any) -> None:
    here = world(num_blocks=100)
    graph = {"type": "graph", "graph": "g", "nodes": {"a": {}}, "edges": []}
    assert here.outcomes("alice", graph, graph) == ["applied", "duplicate"]
    flood = [{**graph, "graph": f"flood{number}"} for number in range(1_000)]
    assert set(here.outcomes("bob", *flood)) == {"applied"}
    for number in range(40):
        here.call("bob", tokens(number, 20), {"session": f"s{number}", "graph": f"unknown{number}"})
    here.call("alice", tokens(99, 20), {"session": "s", "graph": "g"})
    here.call("alice", tokens(98, 20), {"session": "s", "graph": "mine"})

    assert here.outcomes("alice", graph) == ["duplicate"]
    assert here.tell("alice")["need"] == ["mine"]
    assert len(here.tell("bob")["need"]) == 16
    assert here.tell("carol")["need"] == []


def test_one_tenants_decisions_push_out_none_of_another(world: Any) -> None:
    here = world(num_blocks=100)
    here.call("alice", tokens(1), {"session": "s", "app": "a"})
    here.steps.run()
    for number in range(100):
        here.call("bob", tokens(number + 2, 20), {"session": f"s{number}", "app": f"a{number}"})
        here.steps.run()

    assert [entry["kind"] for entry in here.decisions("alice")["decisions"]] == ["started"]
    assert len(here.decisions(None)["decisions"]) == SPACE["decisions"]
