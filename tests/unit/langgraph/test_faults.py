"""Tools raise, are cancelled, time out or ask a human, and calls fail; the application goes on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import HumanMessage
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import NodeTimeoutError
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, interrupt

from tests.unit.langgraph.agents import HELLO, THREAD, agent, quick
from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake, flush
from tokencake_langgraph.calls import CallTable
from tokencake_langgraph.handler import LIFECYCLE


@tool
def broken(q: str) -> str:
    """Broken."""
    raise ValueError(q)


@tool
async def abroken(q: str) -> str:
    """Broken, too."""
    raise ValueError(q)


@tool
def ask(q: str) -> str:
    """Ask a human."""
    return str(interrupt(q))


class Slow:
    """A tool that signals when it runs, and runs until it is told to stop."""

    def __init__(self) -> None:
        self.is_running = threading.Event()
        self.stop = threading.Event()

    def sync(self) -> BaseTool:
        @tool
        def slow(q: str) -> str:
            """Slow."""
            self.is_running.set()
            self.stop.wait(20)
            return q

        return slow

    def on_loop(self) -> BaseTool:
        @tool
        async def slow(q: str) -> str:
            """Slow."""
            self.is_running.set()
            await asyncio.sleep(20)
            return q

        return slow


@pytest.fixture
def slow() -> Any:
    slow = Slow()
    yield slow
    slow.stop.set()


def outcome(engine: ScriptedEngine) -> list[tuple[str, str]]:
    flush()
    return sorted((name, status) for name, _, status in engine.tool_story)


# --- tools ----------------------------------------------------------------------------------------


def test_a_tool_that_raises_is_reported_as_an_error(model: ChatTokencake, engine: ScriptedEngine) -> None:
    with pytest.raises(ValueError, match="x"):
        agent(model, broken).invoke(HELLO, THREAD)
    assert outcome(engine) == [("broken", "error")]
    assert [event["status"] for event in engine.of_type("app_end")] == ["error"]


async def test_an_async_tool_that_raises_is_reported_as_an_error(model: ChatTokencake, engine: ScriptedEngine) -> None:
    with pytest.raises(ValueError, match="x"):
        await agent(model, abroken).ainvoke(HELLO, THREAD)
    assert outcome(engine) == [("abroken", "error")]


def test_an_error_returned_to_the_model_is_an_error(model: ChatTokencake, engine: ScriptedEngine) -> None:
    @tool
    def picky(q: int) -> str:
        """Picky."""
        raise ValueError(q)

    picky.handle_tool_error = True
    bound = model.bind_tools([picky])
    graph = StateGraph(MessagesState)
    graph.add_node("agent", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([picky], handle_tool_errors=True))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    graph.compile().invoke({"messages": [("user", "CALL[picky]")]}, THREAD)
    assert outcome(engine) == [("picky", "error")]
    assert [event["status"] for event in engine.of_type("app_end")] == ["ok"]


@pytest.mark.parametrize("is_async_tool", [True, False])
async def test_a_tool_cancelled_with_its_task_is_reported_as_cancelled(
    model: ChatTokencake, engine: ScriptedEngine, slow: Slow, *, is_async_tool: bool
) -> None:
    run = asyncio.create_task(agent(model, slow.on_loop() if is_async_tool else slow.sync()).ainvoke(HELLO, THREAD))
    await asyncio.to_thread(slow.is_running.wait, 10)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert outcome(engine) == [("slow", "cancelled")]
    assert [event["status"] for event in engine.of_type("app_end")] == ["cancelled"]


async def test_a_tool_that_times_out_is_reported_as_cancelled(
    model: ChatTokencake, engine: ScriptedEngine, slow: Slow
) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(agent(model, slow.on_loop()).ainvoke(HELLO, THREAD), 2.0)
    assert outcome(engine) == [("slow", "cancelled")]


async def test_a_step_that_times_out_cancels_its_async_tool(
    model: ChatTokencake, engine: ScriptedEngine, slow: Slow
) -> None:
    graph = agent(model, slow.on_loop())
    graph.step_timeout = 0.3
    with pytest.raises(TimeoutError):
        await graph.ainvoke(HELLO, THREAD)
    assert outcome(engine) == [("slow", "cancelled")]


def test_a_step_that_times_out_lets_its_sync_tool_run_on(
    model: ChatTokencake, engine: ScriptedEngine, slow: Slow
) -> None:
    graph = agent(model, slow.sync())
    graph.step_timeout = 0.3
    threading.Timer(0.5, slow.stop.set).start()  # threads cannot be cancelled: LangGraph waits for the tool
    with pytest.raises(TimeoutError):
        graph.invoke(HELLO, THREAD)
    ((name, _),) = outcome(engine)
    assert name == "slow"


async def test_the_sibling_of_a_tool_that_raises_is_reported_as_cancelled(
    model: ChatTokencake, engine: ScriptedEngine, slow: Slow
) -> None:
    @tool
    async def fails(q: str) -> str:
        """Fail."""
        await asyncio.to_thread(slow.is_running.wait, 10)
        raise ValueError(q)

    with pytest.raises(ValueError, match="x"):
        await agent(model, slow.on_loop(), fails).ainvoke(HELLO, THREAD)
    assert outcome(engine) == [("fails", "error"), ("slow", "cancelled")]


# --- calls ----------------------------------------------------------------------------------------


async def test_a_call_cancelled_in_flight_leaves_no_run_open(model: ChatTokencake, engine: ScriptedEngine) -> None:
    for work in (agent(model, quick).ainvoke({"messages": [("user", "HOLD")]}), model.ainvoke("HOLD")):
        seen = len(engine.requests)
        run = asyncio.create_task(work)
        await asyncio.to_thread(engine.wait_for, lambda seen=seen: len(engine.requests) > seen)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(LIFECYCLE._tree) == 0


async def test_a_node_that_times_out_with_a_call_in_flight_leaves_no_run_open(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    async def think(state: MessagesState) -> dict[str, Any]:
        await model.ainvoke("HOLD")
        return {}

    graph = StateGraph(MessagesState)
    graph.add_node("think", think, timeout=2.0)
    graph.add_edge(START, "think")
    with pytest.raises(NodeTimeoutError):
        await graph.compile().ainvoke(HELLO, THREAD)
    await asyncio.to_thread(flush)
    assert [event["status"] for event in engine.of_type("app_end")] == ["error"]


def test_a_call_that_fails_leaves_no_run_open(model: ChatTokencake) -> None:
    for call in (model.invoke, lambda text: list(model.stream(text))):
        with pytest.raises(openai.BadRequestError):
            call("FAIL")
        assert len(LIFECYCLE._tree) == 0


async def test_a_stream_left_early_leaves_no_run_open(model: ChatTokencake) -> None:
    stream = model.stream("hello")
    next(stream)
    stream.close()
    astream = model.astream("hello")
    await anext(astream)
    await astream.aclose()
    graph = agent(model, quick).astream(HELLO, stream_mode="messages")
    await anext(graph)
    await graph.aclose()


# --- interrupts -----------------------------------------------------------------------------------


def test_an_interrupt_in_a_tool_stalls_its_session(model: ChatTokencake, engine: ScriptedEngine) -> None:
    graph = agent(model, ask, quick, checkpointer=InMemorySaver())
    graph.invoke(HELLO, THREAD)
    assert outcome(engine) == [("ask", "cancelled"), ("quick", "ok")]
    assert [(event["session"], event["kind"]) for event in engine.of_type("stall_start")] == [("T//a", "interrupt")]
    assert engine.of_type("app_end") == []
    engine.events.clear()
    graph.invoke(Command(resume="yes"), THREAD)
    assert outcome(engine) == [("ask", "ok")]
    assert engine.tool_story[0][1] == engine.hints[0].call
    assert len(engine.of_type("app_end")) == 1


@pytest.mark.parametrize("is_prebuilt", [True, False])
def test_after_a_restart_a_tool_still_finds_its_issuing_call(
    model: ChatTokencake, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, *, is_prebuilt: bool
) -> None:
    if is_prebuilt:
        graph = agent(model, ask, checkpointer=InMemorySaver())
    else:
        bound = model.bind_tools([ask])
        builder = StateGraph(MessagesState)
        builder.add_node(
            "agent", lambda state: {"messages": [bound.invoke([HumanMessage("CALL[ask]"), *state["messages"]])]}
        )
        builder.add_node("tools", ToolNode([ask]))
        builder.add_edge(START, "agent")
        builder.add_conditional_edges("agent", tools_condition)
        builder.add_edge("tools", "agent")
        graph = builder.compile(checkpointer=InMemorySaver(), name="a")
    graph.invoke(HELLO, THREAD)
    flush()
    engine.events.clear()
    monkeypatch.setattr(LIFECYCLE, "_calls", CallTable())
    graph.invoke(Command(resume="yes"), THREAD)
    flush()
    assert engine.tool_story == [("ask", engine.hints[0].call, "ok")]


def test_an_interrupt_in_a_middleware_stalls_the_session(model: ChatTokencake, engine: ScriptedEngine) -> None:
    middleware = [HumanInTheLoopMiddleware(interrupt_on={"quick": True})]
    graph = agent(model, quick, checkpointer=InMemorySaver(), middleware=middleware)
    graph.invoke(HELLO, THREAD)
    flush()
    assert [(event["type"], event["session"]) for event in engine.events] == [("stall_start", "T//a")]
    graph.invoke(Command(resume={"decisions": [{"type": "approve"}]}), THREAD)
    assert outcome(engine) == [("quick", "ok")]


def test_an_interrupt_in_a_sub_agent_stalls_both_sessions(model: ChatTokencake, engine: ScriptedEngine) -> None:
    helper = create_agent(model, [ask], system_prompt="CALL[ask]", name="helper")

    @tool
    def delegate(q: str) -> str:
        """Delegate."""
        return helper.invoke({"messages": [("user", q)]})["messages"][-1].text

    agent(model, delegate, checkpointer=InMemorySaver()).invoke(HELLO, THREAD)
    assert outcome(engine) == [("ask", "cancelled"), ("delegate", "cancelled")]
    assert {event["session"] for event in engine.of_type("stall_start")} == engine.sessions
    assert len(engine.sessions) == 2
