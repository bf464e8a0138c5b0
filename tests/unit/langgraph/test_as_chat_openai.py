"""An app behaves with `ChatTokencake` as with `ChatOpenAI`: same responses, same requests."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, SummarizationMiddleware
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.load import dumps, loads
from langchain_core.messages import BaseMessage, HumanMessage, trim_messages
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableConfig
from langchain_core.tools import tool
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, ConfigDict

from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake

# ChatOpenAI's own, when it streams a structured answer.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")

THREAD: RunnableConfig = {"configurable": {"thread_id": "T"}}
HELLO = {"messages": [("user", "hello")]}
LONG = {"prompt_tokens": 5000, "completion_tokens": 5, "total_tokens": 5005}
OWN_IDS = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|call_[0-9a-f]{12}")

Model = ChatOpenAI
Use = Callable[[Model], Any]


class Answer(BaseModel):
    """An answer."""

    text: str
    number: int


@tool
def search(q: str) -> str:
    """Search."""
    return f"found {q}"


def seen(result: Any) -> Any:
    """A result as JSON, without the ids that are drawn and the name of the class."""
    if isinstance(result, BaseMessage):
        result = result.model_dump(exclude={"id"})
    if isinstance(result, BaseModel):
        result = result.model_dump()
    if isinstance(result, dict):
        return {key: seen(part) for key, part in result.items()}
    if isinstance(result, list | tuple):
        return [seen(part) for part in result]
    return OWN_IDS.sub("#", str(result)).replace("ChatTokencake", "ChatOpenAI")


def play(use: Use, cls: type[Model], engine: ScriptedEngine) -> tuple[Any, list[Any]]:
    engine.requests.clear()
    model = cls(model="fake", base_url=engine.base_url, api_key="k", max_retries=0, stream_usage=True)
    result = seen(use(model))
    bodies = []
    for request in engine.requests:
        extra = request.body.pop("vllm_xargs", {})
        assert extra.keys() <= {"tokencake"}
        bodies.append(json.loads(OWN_IDS.sub("#", json.dumps(request.body, sort_keys=True))))
    return result, bodies


def summarize(model: Model) -> Any:
    middleware = SummarizationMiddleware(model, trigger=("tokens", 4000), keep=("messages", 2))
    agent = create_agent(model, [search], middleware=[middleware], checkpointer=InMemorySaver())
    for turn in range(3):
        answer = agent.invoke({"messages": [("user", f"turn {turn}")]}, THREAD)
    assert "summary" in answer["messages"][0].text
    return answer


def ask_for_one_tool_at_a_time(model: Model) -> Any:
    """As langgraph-supervisor does."""
    assert "parallel_tool_calls" in inspect.signature(model.bind_tools).parameters
    return model.bind_tools([search], parallel_tool_calls=False).invoke("CALL[search]")


def bind_tools_of_every_kind(model: Model) -> Any:
    def look(q: str) -> str:
        """Look."""
        return q

    bound = model.bind_tools((t for t in (search, look, Answer)), tool_choice="any", strict=True)
    return [bound.kwargs, bound.invoke("CALL[look]")]


def answer_in_a_structure(model: Model) -> Any:
    return [
        model.with_structured_output(Answer, method=method, include_raw=True).invoke("go")
        for method in ("json_schema", "function_calling", "json_mode")
    ]


def answer_of_an_agent_in_a_structure(model: Model) -> Any:
    agent = create_agent(model, [search], response_format=ProviderStrategy(Answer))
    return agent.invoke({"messages": [("user", "CALL[search]")]})


def retry_and_fall_back(model: Model) -> Any:
    failing = model.bind(stop=["FAIL"]).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    chain = ChatPromptTemplate.from_messages([("user", "{text}")]) | failing.with_fallbacks([model])
    with pytest.raises(openai.BadRequestError):
        failing.invoke("FAIL")
    return chain.invoke({"text": "hello"})


def fall_back_in_an_agent(model: Model) -> Any:
    failing = model.model_copy(update={"model_kwargs": {"messages": "none of them"}})
    return create_agent(failing, [search], middleware=[ModelFallbackMiddleware(model)]).invoke(HELLO)


def configure(model: Model) -> Any:
    fields = model.configurable_fields(temperature=ConfigurableField("heat"), model_name=ConfigurableField("model"))
    either = model.configurable_alternatives(ConfigurableField("which"), default_key="this", that=model.bind(seed=1))
    return [
        fields.with_config(configurable={"heat": 0.5, "model": "other"}).invoke("hello"),
        fields.bind_tools([search]).invoke("CALL[search]", {"configurable": {"heat": 0.25}}),
        either.invoke("hello", {"configurable": {"which": "that"}}),
        model.with_config(tags=["a"], run_name="b").invoke("hello"),
    ]


def copies(model: Model) -> Any:
    class Holder(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        llm: ChatOpenAI

    changed = model.model_copy(update={"temperature": 0.5})
    found = [copy.copy(model), changed, Holder(llm=model).llm]
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot pickle"):
            make(model)
    return [copied.invoke("hello") for copied in found]


def count_tokens(model: Model) -> Any:
    model = model.model_copy(update={"model_name": "gpt-4"})
    history = [HumanMessage("one two three"), HumanMessage("four")]
    return [
        model.get_num_tokens("hello"),
        model.get_num_tokens_from_messages(history),
        trim_messages(history, max_tokens=20, token_counter=model),
    ]


def trace(model: Model) -> Any:
    collector, usage = RunCollectorCallbackHandler(), UsageMetadataCallbackHandler()
    model.invoke("hello", {"callbacks": [collector, usage]}, stop=["."])
    (run,) = collector.traced_runs
    extra = dict(run.extra or {})
    extra["metadata"] = {key: part for key, part in extra["metadata"].items() if key != "lc_versions"}
    return [run.name, run.run_type, extra, usage.usage_metadata]


def stream_events(model: Model) -> Any:
    async def names() -> list[Any]:
        return [(event["event"], event["name"]) async for event in model.astream_events("hello", version="v2")]

    return asyncio.run(names())


def generate_several(model: Model) -> Any:
    result = model.generate([[HumanMessage("one")], [HumanMessage("two")]])
    return [result.llm_output, [generation[0].message for generation in result.generations]]


def batch_and_stream(model: Model) -> Any:
    return [model.batch(["one", "two"], {"max_concurrency": 1}), list(model.stream("hello"))]


def cache(model: Model) -> Any:
    cached = model.model_copy(update={"cache": InMemoryCache()})
    return [cached.invoke("hello").text, cached.invoke("hello").text, cached.bind(seed=1).invoke("hello").text]


@pytest.mark.parametrize(
    "use",
    [
        summarize,
        ask_for_one_tool_at_a_time,
        bind_tools_of_every_kind,
        answer_in_a_structure,
        answer_of_an_agent_in_a_structure,
        retry_and_fall_back,
        fall_back_in_an_agent,
        configure,
        copies,
        count_tokens,
        trace,
        stream_events,
        generate_several,
        batch_and_stream,
        cache,
    ],
)
@pytest.mark.usefixtures("no_download")
def test_responses_and_requests_are_the_same(engine: ScriptedEngine, use: Use) -> None:
    engine.usage = LONG
    theirs, their_bodies = play(use, ChatOpenAI, engine)
    ours, our_bodies = play(use, ChatTokencake, engine)
    assert ours == theirs
    assert our_bodies == their_bodies


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.invoke("FAIL"),
        lambda model: list(model.stream("FAIL")),
        lambda model: model.bind_tools([search], tool_choice=3),
        lambda model: model.bind_tools(None),
        lambda model: model.with_structured_output(None),
        lambda model: model.invoke([3]),
    ],
)
def test_errors_are_the_same(engine: ScriptedEngine, use: Use) -> None:
    errors = []
    for cls in (ChatOpenAI, ChatTokencake):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever ChatOpenAI raises
            play(use, cls, engine)
        errors.append((caught.type, seen(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_a_model_is_saved_and_loaded_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")
    monkeypatch.setenv("TOKENCAKE_API_KEY", "for this server")
    model = ChatTokencake(model="fake", base_url="http://h/v1", api_key="a89", tool_estimates={"search": 2.0}, n=2)
    text = dumps(model)
    assert "a89" not in text
    loaded = loads(
        text, allowed_objects=[ChatTokencake], valid_namespaces=["tokencake_langgraph"], secrets_from_env=True
    )
    assert loaded.model_dump(exclude={"openai_api_key"}) == model.model_dump(exclude={"openai_api_key"})
    assert loaded.openai_api_key.get_secret_value() == "for this server"


def test_models_of_two_servers_do_not_share_a_cached_answer(engine: ScriptedEngine) -> None:
    other = ScriptedEngine()
    answers = InMemoryCache()
    try:
        for server in (engine, other, engine):
            ChatTokencake(model="fake", base_url=server.base_url, cache=answers).invoke("hello")
        assert (len(engine.requests), len(other.requests)) == (1, 1)
    finally:
        other.close()


def test_a_key_that_cannot_be_hashed_is_a_key(engine: ScriptedEngine) -> None:
    class Key(BaseModel):
        def __call__(self) -> str:
            return "k"

    ChatTokencake(model="fake", base_url=engine.base_url, api_key=Key()).invoke("hello")
    assert engine.requests[0].headers["authorization"] == "Bearer k"
