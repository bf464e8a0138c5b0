"""A call whose parent run was never reported is attributed to its app through LangGraph's context."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from langchain_core.callbacks import CallbackManager
from langchain_core.tracers import context
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langsmith import Client, traceable
from langsmith.run_helpers import tracing_context

from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake, TokencakeHandler, enclosing, flush, handler
from tokencake_langgraph.enclosing import enclosing_graphs
from tokencake_langgraph.lifecycle import LIFECYCLE

HELLO = {"messages": [("user", "hello")]}


def two_nodes(run: Callable[[Any], Any]) -> CompiledStateGraph:
    graph = StateGraph(MessagesState)
    graph.add_node("first", run)
    graph.add_node("second", run)
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    return graph.compile(name="app")


def hooks() -> list[Any]:
    return [hook for hook in context._configure_hooks if hook[2] is TokencakeHandler]


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As before the package is imported: no callback manager that is made gets the handler."""
    rest = [hook for hook in context._configure_hooks if hook[2] is not TokencakeHandler]
    monkeypatch.setattr(context, "_configure_hooks", rest)
    monkeypatch.setattr(handler, "_is_installed", False)
    yield
    assert len(LIFECYCLE._tree) == 0


def test_importing_the_package_installs_one_handler() -> None:
    handler.install()
    handler.install()
    assert len(hooks()) == 1


def test_without_langchains_hook_only_the_hints_are_missing(
    model: ChatTokencake,
    engine: ScriptedEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    not_installed: None,
) -> None:
    monkeypatch.setattr(handler, "register_configure_hook", None)
    handler.install()
    assert "calls are made without a hint" in caplog.text
    assert two_nodes(lambda _: {"messages": [model.invoke("hello")]}).invoke(HELLO)["messages"][-1].text
    assert ["vllm_xargs" in request.body for request in engine.requests] == [False, False]


def test_functions_traced_by_langsmith_belong_to_their_node(model: ChatTokencake, engine: ScriptedEngine) -> None:
    @traceable
    def ask() -> Any:
        return model.invoke("hello")

    client = Client(api_url="http://127.0.0.1:9", api_key="k", session=MagicMock(), auto_batch_tracing=False)
    with tracing_context(enabled=True, client=client):
        two_nodes(lambda _: {"messages": [ask()]}).invoke(HELLO)
    flush()
    first, second = engine.hints
    assert [(hint.agent, hint.node) for hint in engine.hints] == [("first", "first"), ("second", "second")]
    assert first.app == second.app
    assert [event["app"] for event in engine.of_type("app_end")] == [first.app]


async def test_work_that_outlives_its_graph_does_not_reopen_it(model: ChatTokencake, engine: ScriptedEngine) -> None:
    is_over = asyncio.Event()
    left_behind: list[asyncio.Task[Any]] = []

    async def late() -> None:
        await is_over.wait()
        assert enclosing_graphs() == []
        await model.ainvoke("hello")

    async def spawn(_: Any) -> dict[str, Any]:
        left_behind.append(asyncio.create_task(late()))
        return {}

    await two_nodes(spawn).ainvoke(HELLO)
    is_over.set()
    await asyncio.gather(*left_behind)
    assert len(LIFECYCLE._tree) == 0
    assert len({hint.app for hint in engine.hints}) == 2


def test_a_graph_that_began_before_the_handler_is_installed_ends_as_an_app(
    model: ChatTokencake, engine: ScriptedEngine, not_installed: None
) -> None:
    def run(_: Any) -> dict[str, Any]:
        handler.install()
        assert [graph.name for graph in enclosing_graphs()] == ["app"]
        return {"messages": [model.invoke("hello")]}

    two_nodes(run).invoke(HELLO)
    flush()
    assert [hint.agent for hint in engine.hints] == ["first", "second"]
    assert [event["app"] for event in engine.of_type("app_end")] == list({hint.app for hint in engine.hints})


@pytest.mark.parametrize("call", [None, "nonsense", lambda: None, print])
def test_without_langgraphs_private_attributes_only_the_identity_is_missing(
    model: ChatTokencake, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, not_installed: None, call: Any
) -> None:
    monkeypatch.setattr(enclosing, "_CALL", "mine")

    def run(_: Any) -> dict[str, Any]:
        handler.install()
        return {"messages": [model.invoke("hello")]}

    two_nodes(run).invoke(HELLO, {"configurable": {"mine": call, "thread_id": "T"}})
    assert [hint.session for hint in engine.hints] == ["T//first", "T//second"]


def test_two_handlers_report_each_run_once(model: ChatTokencake, engine: ScriptedEngine) -> None:
    manager = CallbackManager([TokencakeHandler(), TokencakeHandler()])
    two_nodes(lambda _: {"messages": [model.invoke("hello")]}).invoke(HELLO, {"callbacks": manager})
    flush()
    assert len({hint.app for hint in engine.hints}) == len(engine.of_type("app_end")) == 1
