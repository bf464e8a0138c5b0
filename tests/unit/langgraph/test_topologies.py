"""In every shape of graph, each call has its agent's identity and each tool call is reported."""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Send

from tests.unit.langgraph.graphs import HELLO, THREAD, read, search
from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake, flush

# ChatOpenAI's own, when it adds up the usage of several lists: OpenAI's client fills absent details with None.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected type for token usage")


@tool
async def fetch(q: str) -> str:
    """Fetch."""
    await asyncio.sleep(0)
    return f"fetched {q}"


def react_graph(model: ChatTokencake, name: str = "LangGraph") -> CompiledStateGraph:
    bound = model.bind_tools([search, read])
    graph = StateGraph(MessagesState)
    graph.add_node("agent", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([search, read]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return graph.compile(name=name)


def test_a_hand_written_loop_is_one_session_with_one_stall_per_tool_call(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    react_graph(model, "helper").invoke({"messages": [("user", "CALL[search,read|search]")]}, THREAD)
    flush()
    first, last = engine.hints
    assert engine.sessions == {"T//helper"}
    assert first.app == last.app
    assert {(name, call, status) for name, call, status in engine.tool_story} == {
        ("search", first.call, "ok"),
        ("read", first.call, "ok"),
    }
    assert first.expects_tools == {"search": None, "read": None}
    assert (first.node, first.reuse, first.agent) == ("agent", "extends", "helper")


def test_the_ids_are_in_the_headers_too(model: ChatTokencake, engine: ScriptedEngine) -> None:
    create_agent(model, [search], name="a").invoke(HELLO, THREAD)
    request = engine.requests[0]
    assert request.headers["x-request-id"] == request.hint.call
    assert request.headers["x-session-id"] == request.hint.session


def test_an_agent_keeps_one_session_over_its_whole_loop(model: ChatTokencake, engine: ScriptedEngine) -> None:
    agent = create_agent(model, [search, read], system_prompt="CALL[search|read]", name="researcher")
    agent.invoke(HELLO, THREAD)
    flush()
    assert len(engine.requests) == 3
    assert engine.sessions == {"T//researcher"}
    assert [name for name, _, _ in engine.tool_story] == ["search", "read"]
    assert [call for _, call, _ in engine.tool_story] == [hint.call for hint in engine.hints[:2]]
    assert [event["app"] for event in engine.of_type("app_end")] == [engine.hints[0].app]


def test_a_second_turn_on_the_thread_is_the_same_session_in_a_new_app(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    agent = create_agent(model, [search], name="a", checkpointer=InMemorySaver())
    for _ in range(2):
        agent.invoke(HELLO, THREAD)
    assert engine.sessions == {"T//a"}
    assert len({hint.app for hint in engine.hints}) == 2


def test_without_a_thread_each_run_of_the_graph_is_a_separate_session(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    agent = create_agent(model, [search], name="a")
    for _ in range(2):
        agent.invoke(HELLO)
    assert [hint.session for hint in engine.hints] == [f"{hint.app}//a" for hint in engine.hints]
    assert len(engine.sessions) == 2


async def test_an_async_agent_that_streams_reports_the_same(model: ChatTokencake, engine: ScriptedEngine) -> None:
    agent = create_agent(model, [fetch], system_prompt="CALL[fetch]", name="a")
    async for _ in agent.astream(HELLO, THREAD, stream_mode="messages"):
        pass
    await asyncio.to_thread(flush)
    assert [request.body.get("stream") for request in engine.requests] == [True, True]
    assert engine.sessions == {"T//a"}
    assert engine.tool_story == [("fetch", engine.hints[0].call, "ok")]


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
@pytest.mark.parametrize("version", ["v2", "v3"])
async def test_streamed_events_carry_the_hint(model: ChatTokencake, engine: ScriptedEngine, version: Any) -> None:
    agent = create_agent(model, [fetch], system_prompt="CALL[fetch]", name="a")
    events = agent.astream_events(HELLO, THREAD, version=version)
    if version == "v3":
        events = await events
    async for _ in events:
        pass
    await asyncio.to_thread(flush)
    assert len({hint.call for hint in engine.hints}) == 2
    assert engine.tool_story == [("fetch", engine.hints[0].call, "ok")]


def test_branches_sent_into_a_subgraph_are_separate_sessions(model: ChatTokencake, engine: ScriptedEngine) -> None:
    class State(TypedDict):
        out: Annotated[list[str], operator.add]

    worker = create_agent(model, [search], system_prompt="CALL[search]", name="worker")
    graph = StateGraph(State)
    graph.add_node("branch", worker)
    graph.add_conditional_edges(START, lambda _: [Send("branch", HELLO) for _ in range(3)], ["branch"])
    graph.compile().invoke({"out": []}, THREAD)
    flush()
    assert len(engine.requests) == 6
    assert len(engine.sessions) == 3
    assert sorted(hint.fan_index for hint in engine.hints) == [0, 0, 1, 1, 2, 2]
    assert {hint.agent for hint in engine.hints} == {"worker"}
    assert len(engine.tool_story) == 3
    session_of = {hint.call: hint.session for hint in engine.hints}
    assert {session_of[call] for _, call, _ in engine.tool_story} == engine.sessions


def test_branches_sent_to_a_plain_node_are_separate_sessions(model: ChatTokencake, engine: ScriptedEngine) -> None:
    class State(TypedDict):
        out: Annotated[list[str], operator.add]

    graph = StateGraph(State)
    graph.add_node("branch", lambda _: {"out": [model.invoke("hello").text]})
    graph.add_conditional_edges(START, lambda _: [Send("branch", {}) for _ in range(3)], ["branch"])
    graph.compile().invoke({"out": []}, THREAD)
    assert len(engine.sessions) == 3
    assert sorted(hint.fan_index for hint in engine.hints) == [0, 1, 2]


def test_nodes_of_a_plain_graph_are_separate_agents(model: ChatTokencake, engine: ScriptedEngine) -> None:
    graph = StateGraph(MessagesState)
    for name in ("planner", "writer"):
        graph.add_node(name, lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "writer")
    graph.compile().invoke(HELLO, THREAD)
    assert [hint.session for hint in engine.hints] == ["T//planner", "T//writer"]
    assert [hint.reuse for hint in engine.hints] == ["unknown", "unknown"]


def test_a_subgraph_has_its_own_namespace(model: ChatTokencake, engine: ScriptedEngine) -> None:
    outer = StateGraph(MessagesState)
    outer.add_node("planner", lambda state: {"messages": [model.invoke(state["messages"])]})
    outer.add_node("inner", react_graph(model))
    outer.add_edge(START, "planner")
    outer.add_edge("planner", "inner")
    outer.compile(name="outer").invoke(HELLO, THREAD)
    planner, inner = engine.hints
    assert planner.session == "T//planner"
    assert inner.session.startswith("T/inner:")
    assert inner.agent == "inner"
    assert planner.app == inner.app


def test_a_sub_agent_names_the_tool_call_that_it_works_for(model: ChatTokencake, engine: ScriptedEngine) -> None:
    helper = create_agent(model, [search], system_prompt="CALL[search]", name="helper")

    @tool
    def delegate(q: str) -> str:
        """Delegate."""
        return helper.invoke({"messages": [("user", q)]})["messages"][-1].text

    create_agent(model, [delegate], system_prompt="CALL[delegate]", name="boss").invoke(HELLO, THREAD)
    flush()
    boss = [hint for hint in engine.hints if hint.agent == "boss"]
    helpers = [hint for hint in engine.hints if hint.agent == "helper"]
    started = {event["tool"]: event["tool_call"] for event in engine.of_type("tool_start")}
    assert {(hint.parent_call, hint.parent_tool_call) for hint in helpers} == {(boss[0].call, started["delegate"])}
    assert {hint.parent_call for hint in boss} == {None}
    assert len({hint.session for hint in helpers}) == 1
    assert {(name, call) for name, call, _ in engine.tool_story} == {
        ("search", helpers[0].call),
        ("delegate", boss[0].call),
    }


def test_tasks_of_the_functional_api_called_in_a_loop_are_one_agent(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    @task
    def think(number: int) -> str:
        return model.invoke(f"step {number}").text

    @entrypoint()
    def flow(steps: int) -> list[str]:
        return [think(number).result() for number in range(steps)]

    flow.invoke(2, THREAD)
    assert len(engine.sessions) == 1
    assert {hint.agent for hint in engine.hints} == {"think"}


def test_a_loop_written_inside_one_node_finds_its_own_calls(model: ChatTokencake, engine: ScriptedEngine) -> None:
    engine.tool_call_id = lambda name: f"functions.{name}:0"

    def work(state: MessagesState) -> dict[str, Any]:
        answer = model.bind_tools([search]).invoke([HumanMessage("CALL[search]")])
        return {"messages": [answer, search.invoke(answer.tool_calls[0])]}

    graph = StateGraph(MessagesState)
    graph.add_node("left", work)
    graph.add_node("right", work)
    graph.add_edge(START, "left")
    graph.add_edge("left", "right")
    graph.compile().invoke(HELLO, THREAD)
    flush()
    assert [call for _, call, _ in engine.tool_story] == [hint.call for hint in engine.hints]


def test_equal_tool_call_ids_of_parallel_agents_are_distinguished(model: ChatTokencake, engine: ScriptedEngine) -> None:
    engine.tool_call_id = lambda name: f"functions.{name}:0"
    graph = StateGraph(MessagesState)
    for name in ("left", "right"):
        graph.add_node(name, create_agent(model, [search], system_prompt="CALL[search]", name=name))
        graph.add_edge(START, name)
    graph.compile().invoke(HELLO, THREAD)
    flush()
    asked = {hint.session: hint.call for hint in reversed(engine.hints)}
    assert len(asked) == 2
    assert {call for _, call, _ in engine.tool_story} == set(asked.values())
