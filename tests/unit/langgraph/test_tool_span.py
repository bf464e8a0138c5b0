"""Plain code in a node stalls its session while a `tool_span` is open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake, flush, tool_span

THREAD: RunnableConfig = {"configurable": {"thread_id": "T"}}
HELLO = {"messages": [("user", "hello")]}


def one_node(work: Any) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("worker", work)
    graph.add_edge(START, "worker")
    return graph.compile()


def stalls(engine: ScriptedEngine) -> list[tuple[str, str, str]]:
    flush()
    return [
        (event["type"], event["session"], event["kind"]) for event in engine.events if event["type"].startswith("stall")
    ]


BOTH = [("stall_start", "T//worker", "crawl"), ("stall_end", "T//worker", "crawl")]


def test_a_span_stalls_the_session_of_its_node(model: ChatTokencake, engine: ScriptedEngine) -> None:
    def work(state: MessagesState) -> dict[str, Any]:
        answer = model.invoke(state["messages"])
        with tool_span("crawl", estimate_s=3.0):
            return {"messages": [answer]}

    one_node(work).invoke(HELLO, THREAD)
    assert stalls(engine) == BOTH
    assert engine.of_type("stall_start")[0]["estimate_s"] == 3.0


async def test_an_async_span_stalls_the_session_of_its_node(model: ChatTokencake, engine: ScriptedEngine) -> None:
    async def work(state: MessagesState) -> dict[str, Any]:
        answer = await model.ainvoke(state["messages"])
        async with tool_span("crawl"):
            await asyncio.sleep(0)
        return {"messages": [answer]}

    await one_node(work).ainvoke(HELLO, THREAD)
    assert stalls(engine) == BOTH


async def test_decorated_functions_are_spans(model: ChatTokencake, engine: ScriptedEngine) -> None:
    @tool_span("crawl")
    def crawl(number: int) -> int:
        return number + 1

    @tool_span("crawl")
    async def acrawl(number: int) -> int:
        return number + 1

    async def work(state: MessagesState) -> dict[str, Any]:
        answer = await model.ainvoke(state["messages"])
        assert crawl(1) == await acrawl(1) == 2
        return {"messages": [answer]}

    await one_node(work).ainvoke(HELLO, THREAD)
    assert stalls(engine) == BOTH * 2


def test_a_span_ends_with_an_error(model: ChatTokencake, engine: ScriptedEngine) -> None:
    def work(state: MessagesState) -> None:
        model.invoke(state["messages"])
        with tool_span("crawl"):
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        one_node(work).invoke(HELLO, THREAD)
    assert stalls(engine) == BOTH


def test_a_tool_called_by_plain_code_stalls_the_session_of_its_node(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    @tool
    def search(q: str) -> str:
        """Search."""
        return q

    def work(state: MessagesState) -> dict[str, Any]:
        answer = model.invoke(state["messages"])
        search.invoke({"q": "x"})
        return {"messages": [answer]}

    one_node(work).invoke(HELLO, THREAD)
    assert stalls(engine) == [("stall_start", "T//worker", "tool:search"), ("stall_end", "T//worker", "tool:search")]


def test_a_span_inside_a_tool_sends_no_event(model: ChatTokencake, engine: ScriptedEngine) -> None:
    @tool
    def search(q: str) -> str:
        """Search."""
        with tool_span("part"):
            return q

    create_agent(model, [search], system_prompt="CALL[search]", name="a").invoke(HELLO, THREAD)
    assert stalls(engine) == []
    assert len(engine.tool_story) == 1


def test_a_span_outside_a_graph_or_before_the_first_call_sends_no_event(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    def work(state: MessagesState) -> dict[str, Any]:
        with tool_span("crawl"):
            pass
        return {"messages": [model.invoke(state["messages"])]}

    with tool_span("crawl"):
        one_node(work).invoke(HELLO, THREAD)
    assert stalls(engine) == []


@pytest.mark.parametrize("estimate_s", [-1.0, float("nan"), "long"])
def test_an_estimate_that_is_not_a_duration_is_named(estimate_s: Any) -> None:
    with pytest.raises(ValueError, match=r"'crawl'.*for example 4\.0"):
        tool_span("crawl", estimate_s=estimate_s)
