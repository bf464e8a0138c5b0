"""`ChatTokencake` is a `ChatOpenAI` with other defaults, a hint in each request, and all fields of vLLM's response."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel, SecretStr, ValidationError

import tokencake_langgraph
from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake, flush
from tokencake_langgraph.sender import _resolve, events_url
from tokencake_langgraph.settings import DEFAULT_BASE_URL

# ChatOpenAI's own, when it streams a structured answer.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


class TestStandard(ChatModelUnitTests):
    """LangChain's own suite for chat models."""

    @property
    def chat_model_class(self) -> type[ChatTokencake]:
        return ChatTokencake

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "fake", "base_url": "http://127.0.0.1:9/v1"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        env = {"TOKENCAKE_API_KEY": "key", "TOKENCAKE_BASE_URL": "http://server/v1"}
        return env, {"model": "fake"}, {"openai_api_key": "key", "openai_api_base": "http://server/v1"}

    @pytest.mark.filterwarnings("ignore:The function `load` is in beta")
    @pytest.mark.xfail(reason="of other packages LangChain loads classes that it is given only", raises=ValueError)
    def test_serdes(self, model: Any) -> None:
        load(dumpd(model), allowed_objects="all", valid_namespaces=model.get_lc_namespace())


class Answer(BaseModel):
    """An answer."""

    text: str
    number: int


@tool
def search(q: str) -> str:
    """Search."""
    return q


def hint_of(engine: ScriptedEngine) -> Any:
    return engine.requests[-1].hint


# --- construction ---------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    names = ["ChatTokencake", "SenderStats", "TokencakeHandler", "flush", "stats", "tool_span"]
    assert tokencake_langgraph.__all__ == sorted(names)
    assert all(hasattr(tokencake_langgraph, name) for name in names)


def test_it_is_a_chat_openai_with_its_own_version(model: ChatTokencake) -> None:
    assert isinstance(model, ChatOpenAI)
    assert "tokencake" in (model.metadata or {})["lc_versions"]


def test_the_responses_api_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValidationError, match=r"use_responses_api.*True.*Omit the argument"):
        ChatTokencake(model="fake", use_responses_api=True)


def test_a_model_name_does_not_choose_the_responses_api(
    make_model: Callable[..., ChatTokencake], engine: ScriptedEngine
) -> None:
    make_model(model="gpt-5-pro").invoke("hello")
    assert engine.requests[0].body["model"] == "gpt-5-pro"


def test_arguments_out_of_range_are_named() -> None:
    for settings in ({"importance": 11}, {"tool_estimates": {"a": -1}}, {"expected_output_tokens": -1}):
        with pytest.raises(ValidationError, match=next(iter(settings))):
            ChatTokencake(model="fake", **settings)


# --- base URL and key -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "settings", "url", "key"),
    [
        ({}, {}, DEFAULT_BASE_URL, "EMPTY"),
        ({}, {"base_url": "http://a/v1", "api_key": "k"}, "http://a/v1", "k"),
        ({}, {"openai_api_base": "http://a/v1", "openai_api_key": "k"}, "http://a/v1", "k"),
        ({"TOKENCAKE_BASE_URL": "http://t/v1", "TOKENCAKE_API_KEY": "t"}, {}, "http://t/v1", "t"),
        ({"TOKENCAKE_BASE_URL": "http://t/v1", "OPENAI_BASE_URL": "http://o/v1"}, {}, "http://t/v1", "EMPTY"),
        ({"OPENAI_API_KEY": "secret"}, {}, DEFAULT_BASE_URL, "EMPTY"),
        ({"OPENAI_API_KEY": "secret"}, {"base_url": "http://a/v1"}, "http://a/v1", "EMPTY"),
        ({"OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "http://o/v1"}, {}, "http://o/v1", "o"),
        ({"OPENAI_API_KEY": "o", "OPENAI_API_BASE": "http://o/v1"}, {"api_key": "k"}, "http://o/v1", "k"),
        ({"TOKENCAKE_BASE_URL": "", "TOKENCAKE_API_KEY": ""}, {"base_url": None}, DEFAULT_BASE_URL, "EMPTY"),
    ],
)
def test_base_url_and_key_come_from_arguments_then_environment(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], settings: dict[str, Any], url: str, key: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    model = ChatTokencake(model="fake", **settings)
    assert isinstance(model.openai_api_key, SecretStr)
    assert (model.openai_api_base, model.openai_api_key.get_secret_value()) == (url, key)


@pytest.mark.parametrize("base_url", ["http://h:1/v1", "http://h:1/v1/", "http://h:1"])
def test_the_events_url_is_beside_the_openai_api(base_url: str) -> None:
    assert events_url(base_url) == "http://h:1/v1/tokencake/events"


def test_events_carry_the_models_key_and_headers(
    make_model: Callable[..., ChatTokencake], engine: ScriptedEngine
) -> None:
    model = make_model(api_key=lambda: "from a function", default_headers={"X-Team": "red"})
    create_agent(model, [search], system_prompt="CALL[search]").invoke({"messages": [("user", "hi")]})
    flush()
    assert engine.event_headers[0]["authorization"] == "Bearer from a function"
    assert engine.event_headers[0]["x-team"] == "red"


def test_a_key_can_be_a_coroutine_function() -> None:
    async def key() -> str:
        return "k"

    assert _resolve(key) == "k"


# --- the request ----------------------------------------------------------------------------------


def test_the_users_own_body_and_headers_are_merged_and_take_precedence(
    make_model: Callable[..., ChatTokencake], engine: ScriptedEngine
) -> None:
    model = make_model(
        extra_body={"top_k": 5, "vllm_xargs": {"mine": 1, "both": "model"}},
        default_headers={"x-session-id": "my session"},
        model_kwargs={"extra_headers": {"X-A": "1"}},
    )
    model.invoke(
        "hello",
        extra_body={"min_p": 0.1, "vllm_xargs": {"both": "call"}},
        extra_headers={"X-Request-ID": "my id", "X-B": "2"},
    )
    (request,) = engine.requests
    assert (request.body["top_k"], request.body["min_p"]) == (5, 0.1)
    assert request.body["vllm_xargs"].keys() == {"tokencake", "mine", "both"}
    assert request.body["vllm_xargs"]["both"] == "call"
    names = ("x-a", "x-b", "x-request-id", "x-session-id")
    assert [request.headers[name] for name in names] == ["1", "2", "my id", "my session"]


def test_a_hint_written_by_hand_stays(model: ChatTokencake, engine: ScriptedEngine) -> None:
    model.invoke("hello", extra_body={"vllm_xargs": {"tokencake": '{"session":"mine"}'}})
    assert engine.requests[0].body["vllm_xargs"] == {"tokencake": '{"session":"mine"}'}


def test_a_hint_can_hold_values_that_are_invalid_in_headers(model: ChatTokencake, engine: ScriptedEngine) -> None:
    agent = create_agent(model, [search], name="büro\n" + "x" * 300)
    agent.invoke({"messages": [("user", "hi")]}, {"configurable": {"thread_id": "Zoë 1"}})
    (request,) = engine.requests
    assert request.headers["x-session-id"] == request.hint.session
    assert request.hint.session.startswith("Zo%C3%AB%201//b%C3%BCro%0A")


def test_disabled_it_is_a_plain_chat_openai(make_model: Callable[..., ChatTokencake], engine: ScriptedEngine) -> None:
    make_model(tokencake_enabled=False).invoke("hello")
    assert "vllm_xargs" not in engine.requests[0].body
    assert tokencake_langgraph.stats() == ()


def test_estimates_come_from_the_model_or_the_tool(
    make_model: Callable[..., ChatTokencake], engine: ScriptedEngine
) -> None:
    @tool
    def crawl(q: str) -> str:
        """Crawl."""
        return q

    crawl.metadata = {"tokencake": {"estimate_s": 7}}
    model = make_model(tool_estimates={"search": 4.0}, importance=2, expected_output_tokens=50)
    create_agent(model, [search, crawl], system_prompt="CALL[search,crawl]").invoke({"messages": [("user", "hi")]})
    flush()
    hint = engine.hints[0]
    assert hint.expects_tools == {"search": 4.0, "crawl": 7.0}
    assert (hint.importance, hint.expected_output_tokens) == (2, 50)
    assert {event["tool"]: event.get("estimate_s") for event in engine.of_type("tool_start")} == {
        "search": 4.0,
        "crawl": 7.0,
    }


def test_an_invalid_estimate_is_named(model: ChatTokencake) -> None:
    @tool
    def crawl(q: str) -> str:
        """Crawl."""
        return q

    crawl.metadata = {"tokencake": {"estimate_s": "long"}}
    with pytest.raises(ValueError, match=r"'crawl' is .*'long'.*for example"):
        model.bind_tools([crawl])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_the_schema_of_a_structured_output_is_not_a_tool(
    model: ChatTokencake, engine: ScriptedEngine, method: Any
) -> None:
    structured = model.with_structured_output(Answer, method=method)
    assert structured.invoke("go") == Answer(text="x", number=1)
    assert await structured.ainvoke("go") == Answer(text="x", number=1)
    assert list(structured.stream("go"))[-1] == Answer(text="x", number=1)
    assert [(hint.expects_tools, hint.reuse) for hint in engine.hints] == [(None, "unknown")] * 3


def test_several_choices_are_one_call(make_model: Callable[..., ChatTokencake], engine: ScriptedEngine) -> None:
    result = make_model(n=3).generate([[HumanMessage("hello")]])
    assert len(result.generations[0]) == 3
    assert len(engine.hints) == 1


def test_identity_does_not_change_the_key_of_a_cache(
    make_model: Callable[..., ChatTokencake], engine: ScriptedEngine
) -> None:
    model = make_model(cache=InMemoryCache())
    assert model.invoke("hello").text == model.invoke("hello").text
    assert len(engine.requests) == 1


def test_max_tokens_is_sent(model: ChatTokencake, engine: ScriptedEngine) -> None:
    model.bind(max_tokens=7).invoke("hello")
    assert engine.requests[0].body["max_completion_tokens"] == 7


def test_a_huge_tool_box_does_not_void_the_hint(model: ChatTokencake, engine: ScriptedEngine) -> None:
    functions = [{"type": "function", "function": {"name": f"{number}{'ü' * 200}"}} for number in range(130)]
    model.invoke("hello", tools=functions)
    assert engine.hints[0].expects_tools is None
    assert engine.hints[0].reuse == "extends"


def test_the_trace_context_is_sent(model: ChatTokencake, engine: ScriptedEngine) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(1, 2, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        model.invoke("hello")
    assert engine.requests[0].headers["traceparent"] == f"00-{1:032x}-{2:016x}-01"
    model.invoke("hello")
    assert "traceparent" not in engine.requests[1].headers


# --- the response ---------------------------------------------------------------------------------


async def test_report_reasoning_and_usage_of_the_engine_are_kept(model: ChatTokencake, engine: ScriptedEngine) -> None:
    engine.report = {"accepted": True, "queued_s": 0.5, "prefix": {"device": 3}}
    engine.reasoning = "step by step"
    whole = [model.invoke("hello"), await model.ainvoke("hello")]
    streamed = AIMessageChunk("")
    for chunk in model.stream("hello"):
        streamed += chunk
    astreamed = AIMessageChunk("")
    async for chunk in model.astream("hello"):
        astreamed += chunk
    for message in (*whole, streamed, astreamed):
        assert message.text == "all is well"
        assert message.response_metadata["tokencake"] == engine.report
        assert message.additional_kwargs["reasoning_content"] == engine.reasoning
        assert message.usage_metadata is not None
        assert message.usage_metadata["input_token_details"]["cache_read"] == 4


def test_reasoning_before_a_structured_output_is_reported_once(model: ChatTokencake, engine: ScriptedEngine) -> None:
    engine.reasoning = "step by step"
    engine.report = {"accepted": True}
    bound = model.bind(response_format=model.with_structured_output(Answer).steps[0].kwargs["response_format"])
    whole = AIMessageChunk("")
    for chunk in bound.stream("go"):
        whole += chunk
    assert json.loads(whole.text) == {"text": "x", "number": 1}
    assert whole.additional_kwargs["reasoning_content"] == "step by step"
    assert whole.response_metadata["tokencake"] == {"accepted": True}
