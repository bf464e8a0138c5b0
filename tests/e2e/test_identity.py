"""The engine records the agent, node, session and parent of each call, and the start and end of each tool call."""

from __future__ import annotations

import asyncio
import operator
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.tools import BaseTool, tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Send
from pydantic import Field

from tests.e2e.conftest import API_KEY, Server

TRUTH_S = 1.0
"""How far an event may be from the truth: a busy machine runs the handler and the tool a moment apart."""

Waits = list[tuple[float, float]]
Query = Annotated[str, Field(max_length=8)]


def waiting_tool(waits: Waits, seconds: float = 0.5) -> BaseTool:
    """A tool that notes when it really ran, in seconds since the epoch."""

    @tool
    def look_up(query: Query) -> str:
        """Look something up."""
        started = time.time()
        time.sleep(seconds)
        waits.append((started, time.time()))
        return "found"

    return look_up


def thread() -> dict[str, Any]:
    return {"configurable": {"thread_id": f"thread-{uuid.uuid4()}"}}


def calls_of(server: Server, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of one thread, in order of arrival."""
    thread_id = config["configurable"]["thread_id"]
    return [call for call in server.state()["calls"] if call["session"].startswith(thread_id)]


def assert_true_to(waits: Waits, calls: list[dict[str, Any]]) -> None:
    tools = sorted((entry for call in calls for entry in call["tools"]), key=lambda entry: entry["start"])
    assert len(tools) == len(waits) > 0
    for entry, (started, ended) in zip(tools, sorted(waits), strict=True):
        assert entry["status"] == "ok"
        assert entry["start"] == pytest.approx(started, abs=TRUTH_S)
        assert entry["end"] == pytest.approx(ended, abs=TRUTH_S)
        assert entry["duration_s"] == pytest.approx(ended - started, abs=TRUTH_S)


def tool_loop(server: Server, waits: Waits, *, turns: int = 2, name: str = "loop") -> Any:
    """StateGraph + ToolNode: `turns` tool calls, then an answer. The node is called `researcher`."""
    tools = [waiting_tool(waits)]
    model = server.chat()

    def researcher(state: MessagesState) -> dict[str, Any]:
        done = sum(message.type == "tool" for message in state["messages"])
        choice = "look_up" if done < turns else "none"
        return {"messages": [model.bind_tools(tools, tool_choice=choice, strict=True).invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("researcher", researcher)
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "researcher")
    graph.add_conditional_edges(
        "researcher", lambda s: "tools" if s["messages"][-1].tool_calls else END, ["tools", END]
    )
    graph.add_edge("tools", "researcher")
    return graph.compile(name=name)


class CallsOneTool(AgentMiddleware):
    """Scripts the choice that a model with random weights cannot make."""

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(self._scripted(request))

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        return await handler(self._scripted(request))

    def _scripted(self, request: Any) -> Any:
        done = any(message.type == "tool" for message in request.messages)
        choice = "none" if done else request.tools[0].name
        return request.override(tool_choice=choice, model_settings={"strict": True})


def one_tool_agent(server: Server, waits: Waits, name: str) -> Any:
    return create_agent(server.chat(), [waiting_tool(waits)], name=name, middleware=[CallsOneTool()])


QUESTION = {"messages": [("user", "What is a prefix cache?")]}


def test_a_state_graph_with_a_tool_node(server: Server) -> None:
    waits: Waits = []
    config = thread()
    tool_loop(server, waits).invoke(QUESTION, config)
    calls = calls_of(server, config)
    assert [call["agent"] for call in calls] == ["researcher"] * 3
    assert [call["node"] for call in calls] == ["researcher"] * 3
    assert {call["status"] for call in calls} == {"finished"}
    assert len({call["session"] for call in calls}) == 1
    assert len({call["app"] for call in calls}) == 1
    assert [len(call["tools"]) for call in calls] == [1, 1, 0]
    assert {call["parent_call"] for call in calls} == {None}
    assert_true_to(waits, calls)


MADE_IN_A_NODE = """
import os
from langgraph.graph import START, MessagesState, StateGraph

def say(state):
    from tokencake_langgraph import ChatTokencake
    return {"messages": [ChatTokencake(model="tiny", max_tokens=4).invoke(state["messages"])]}

graph = StateGraph(MessagesState)
for before, after in ((START, "a"), ("a", "b"), ("b", "c")):
    graph.add_node(after, say)
    graph.add_edge(before, after)
graph.compile().invoke({"messages": [("user", "hello")]}, {"configurable": {"thread_id": os.environ["THREAD"]}})
"""


def test_a_first_model_created_in_a_node_belongs_to_one_app(server: Server) -> None:
    config = thread()
    settings = {"TOKENCAKE_BASE_URL": f"{server.proxy}/v1", "TOKENCAKE_API_KEY": API_KEY}
    env = {**os.environ, **settings, "THREAD": config["configurable"]["thread_id"]}
    subprocess.run([sys.executable, "-c", MADE_IN_A_NODE], env=env, check=True, timeout=120)
    calls = calls_of(server, config)
    assert [call["agent"] for call in calls] == ["a", "b", "c"]
    assert len({call["app"] for call in calls}) == 1


def test_a_follow_up_call_finds_its_prefix_in_the_cache(server: Server) -> None:
    config = thread()
    tool_loop(server, []).invoke(QUESTION, config)
    first, second, _ = calls_of(server, config)
    whole_blocks = first["prompt_tokens"] // 32 * 32
    assert second["cached_tokens"]["device"] >= whole_blocks > 0


def test_an_agent_of_create_agent(server: Server) -> None:
    waits: Waits = []
    config = thread()
    one_tool_agent(server, waits, "librarian").invoke(QUESTION, config)
    calls = calls_of(server, config)
    assert [(call["agent"], call["node"]) for call in calls] == [("librarian", "model")] * 2
    assert len({call["session"] for call in calls}) == 1
    assert_true_to(waits, calls)


class Fan(TypedDict):
    answers: Annotated[list[str], operator.add]


def test_the_branches_of_a_send_are_separate_sessions(server: Server) -> None:
    waits: Waits = []
    config = thread()
    worker = one_tool_agent(server, waits, "worker")

    def branch(state: dict[str, Any]) -> dict[str, Any]:
        return {"answers": [worker.invoke(state)["messages"][-1].text]}

    graph = StateGraph(Fan)
    graph.add_node("branch", branch)
    graph.add_conditional_edges(
        START, lambda _: [Send("branch", {"messages": [("user", f"part {part}")]}) for part in range(3)], ["branch"]
    )
    graph.compile(name="fan").invoke({"answers": []}, config)
    calls = calls_of(server, config)
    assert [call["agent"] for call in calls] == ["worker"] * 6
    sessions = [call["session"] for call in calls]
    assert {sessions.count(session) for session in sessions} == {2}
    assert len(set(sessions)) == 3
    assert len({call["app"] for call in calls}) == 1
    assert_true_to(waits, calls)


def test_a_sub_agent_inside_a_tool_names_the_call_that_waits_for_it(server: Server) -> None:
    config = thread()
    helper = one_tool_agent(server, [], "helper")

    @tool
    def ask_helper(query: Query) -> str:
        """Ask the helper."""
        return helper.invoke({"messages": [("user", query or "?")]})["messages"][-1].text

    boss = create_agent(server.chat(), [ask_helper], name="boss", middleware=[CallsOneTool()])
    boss.invoke(QUESTION, config)
    calls = calls_of(server, config)
    first, *inner, last = calls
    assert [call["agent"] for call in calls] == ["boss", "helper", "helper", "boss"]
    assert {call["parent_call"] for call in inner} == {first["call"]}
    assert {call["parent_tool_call"] for call in inner} == {first["tools"][0]["tool_call"]}
    assert last["parent_call"] is None
    assert first["session"] == last["session"] != inner[0]["session"]


def test_a_subgraph_that_is_a_node(server: Server) -> None:
    waits: Waits = []
    config = thread()
    model = server.chat()
    outer = StateGraph(MessagesState)
    outer.add_node("writer", lambda state: {"messages": [model.invoke(state["messages"])]})
    outer.add_node("research", tool_loop(server, waits, turns=1))
    outer.add_edge(START, "writer")
    outer.add_edge("writer", "research")
    outer.compile(name="outer").invoke(QUESTION, config)
    calls = calls_of(server, config)
    assert [(call["agent"], call["node"]) for call in calls] == [
        ("writer", "writer"),
        ("researcher", "researcher"),
        ("researcher", "researcher"),
    ]
    assert calls[0]["session"] != calls[1]["session"] == calls[2]["session"]
    assert_true_to(waits, calls)


async def test_a_streamed_async_run(server: Server) -> None:
    waits: Waits = []
    config = thread()

    @tool
    async def look_up(query: Query) -> str:
        """Look something up."""
        started = time.time()
        await asyncio.sleep(0.5)
        waits.append((started, time.time()))
        return "found"

    agent = create_agent(server.chat(), [look_up], name="streamer", middleware=[CallsOneTool()])
    tokens = [chunk async for chunk, _ in agent.astream(QUESTION, config, stream_mode="messages")]
    calls = await asyncio.to_thread(calls_of, server, config)
    assert len(tokens) > 10
    assert [(call["agent"], call["node"]) for call in calls] == [("streamer", "model")] * 2
    assert calls[0]["output_tokens"] > 0
    assert_true_to(waits, calls)


def test_two_turns_of_one_thread_extend_the_same_session(server: Server) -> None:
    config = thread()
    graph = tool_loop(server, [], turns=0)
    graph.invoke(QUESTION, config)
    graph.invoke(QUESTION, config)
    first, second = calls_of(server, config)
    assert first["session"] == second["session"]
    assert first["app"] != second["app"]


def test_a_tool_that_raises_is_an_error_in_the_state(server: Server) -> None:
    config = thread()

    @tool
    def break_down(query: Query) -> str:
        """Break."""
        raise RuntimeError("broken")

    agent = create_agent(server.chat(), [break_down], name="unlucky", middleware=[CallsOneTool()])
    with pytest.raises(RuntimeError, match="broken"):
        agent.invoke(QUESTION, config)
    (call,) = calls_of(server, config)
    assert [entry["status"] for entry in call["tools"]] == ["error"]


async def test_a_tool_that_is_cancelled_or_times_out_is_cancelled_in_the_state(server: Server) -> None:
    config = thread()

    is_running = asyncio.Event()

    @tool
    async def sleep_long(query: Query) -> str:
        """Sleep."""
        is_running.set()
        await asyncio.sleep(60)
        return "never"

    agent = create_agent(server.chat(), [sleep_long], name="sleeper", middleware=[CallsOneTool()])
    run = asyncio.create_task(agent.ainvoke(QUESTION, config))
    await asyncio.wait_for(is_running.wait(), timeout=60)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run, timeout=0.5)
    (call,) = await asyncio.to_thread(calls_of, server, config)
    assert [entry["status"] for entry in call["tools"]] == ["cancelled"]
    assert 0.4 < call["tools"][0]["duration_s"] < 60
