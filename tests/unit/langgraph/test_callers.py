"""Calls from threads, middlewares, batches and outside of graphs are attributed to the right agent."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from tests.unit.langgraph.graphs import HELLO, THREAD, read, search
from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake, TokencakeHandler, flush

# ChatOpenAI's own, when it adds up the usage of several lists: OpenAI's client fills absent details with None.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected type for token usage")


def one_node(run: Callable[[Any], Any], name: str = "worker") -> CompiledStateGraph:
    graph = StateGraph(MessagesState)
    graph.add_node(name, run)
    graph.add_edge(START, name)
    return graph.compile()


def test_each_engine_gets_events_of_its_own_calls_only(
    make_model: Callable[..., ChatTokencake], engine: ScriptedEngine
) -> None:
    other = ScriptedEngine()
    try:
        graph = StateGraph(MessagesState)
        for name, url, prompt in (("left", engine.base_url, "CALL[search]"), ("right", other.base_url, "CALL[read]")):
            model = make_model(base_url=url)
            graph.add_node(name, create_agent(model, [search, read], system_prompt=prompt, name=name))
        graph.add_edge(START, "left")
        graph.add_edge("left", "right")
        graph.compile().invoke(HELLO, THREAD)
        flush()
        for server, tool_name in ((engine, "search"), (other, "read")):
            assert server.tool_story == [(tool_name, server.hints[0].call, "ok")]
            assert [event["app"] for event in server.of_type("app_end")] == [server.hints[0].app]
    finally:
        other.close()


def test_calls_of_another_vendors_model_send_no_events(model: ChatTokencake, engine: ScriptedEngine) -> None:
    plain = ChatOpenAI(model="fake", base_url=engine.base_url, api_key="k", max_retries=0)
    create_agent(plain, [search], system_prompt="CALL[search]", name="a").invoke(HELLO, THREAD)
    flush()
    assert isinstance(model, ChatTokencake)
    assert all("vllm_xargs" not in request.body for request in engine.requests)
    assert engine.events == []


def test_a_call_from_a_thread_without_context_has_a_hint_too(model: ChatTokencake, engine: ScriptedEngine) -> None:
    def work(state: MessagesState) -> dict[str, Any]:
        with ThreadPoolExecutor(1) as pool:
            return {"messages": [pool.submit(model.invoke, state["messages"]).result()]}

    one_node(work).invoke(HELLO, THREAD)
    (hint,) = engine.hints
    assert hint.session == f"{hint.call}//default"


def test_a_middleware_calls_the_model_as_its_agent(model: ChatTokencake, engine: ScriptedEngine) -> None:
    class Guard(AgentMiddleware):
        def before_model(self, state: Any, runtime: Any) -> None:
            model.invoke("is this allowed?")

    create_agent(model, [search], middleware=[Guard()], name="a").invoke(HELLO, THREAD)
    assert {hint.agent for hint in engine.hints} == {"a"}
    assert [hint.node for hint in engine.hints] == ["Guard.before_model", "model"]


def test_a_handler_in_the_config_reports_nothing_twice(model: ChatTokencake, engine: ScriptedEngine) -> None:
    agent = create_agent(model, [search], system_prompt="CALL[search]", name="a")
    agent.invoke(HELLO, {**THREAD, "callbacks": [TokencakeHandler(), TokencakeHandler()]})
    flush()
    assert len(engine.of_type("tool_start")) == len(engine.of_type("tool_end")) == 1
    assert len(engine.of_type("app_end")) == 1


def test_generate_in_a_node_finds_its_node(model: ChatTokencake, engine: ScriptedEngine) -> None:
    def work(state: MessagesState) -> dict[str, Any]:
        model.generate([[HumanMessage("one")], [HumanMessage("two")]])
        return {}

    one_node(work).invoke(HELLO, THREAD)
    assert [hint.session for hint in engine.hints] == ["T//worker"] * 2
    assert len({hint.call for hint in engine.hints}) == 2


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_agenerate_with_two_lists_gives_each_call_its_own_id(
    make_model: Callable[..., ChatTokencake], engine: ScriptedEngine, *, is_streaming: bool
) -> None:
    model = make_model(streaming=is_streaming)
    result = await model.agenerate([[HumanMessage("one")], [HumanMessage("two")]])
    assert result.run is not None
    assert {hint.call for hint in engine.hints} == {str(info.run_id) for info in result.run}


async def test_a_batch_is_one_call_per_input(model: ChatTokencake, engine: ScriptedEngine) -> None:
    model.batch(["one", "two", "three"])
    await model.abatch(["four", "five"])
    assert len({hint.call for hint in engine.hints}) == 5


def test_a_call_outside_a_graph_is_a_separate_app(model: ChatTokencake, engine: ScriptedEngine) -> None:
    model.invoke("hello")
    (hint,) = engine.hints
    assert hint.app == hint.call
    assert hint.agent == "default"


def test_a_chain_without_a_graph_is_one_app(model: ChatTokencake, engine: ScriptedEngine) -> None:
    chain = RunnableLambda(lambda text: text.upper()) | model
    chain.with_config(run_name="shouter").invoke("hello")
    flush()
    (hint,) = engine.hints
    assert hint.agent == "shouter"
    assert [event["app"] for event in engine.of_type("app_end")] == [hint.app]


def test_twenty_agents_in_threads_have_separate_sessions(model: ChatTokencake, engine: ScriptedEngine) -> None:
    agent = create_agent(model, [search, read], system_prompt="CALL[search,read|search]", name="a")

    def run(number: int) -> AIMessage:
        return agent.invoke(HELLO, {"configurable": {"thread_id": f"T{number}"}})["messages"][-1]

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(run, range(20)))
    flush()
    assert engine.sessions == {f"T{number}//a" for number in range(20)}
    session_of = {hint.call: hint.session for hint in engine.hints}
    reported = [(session_of[call], name, status) for name, call, status in engine.tool_story]
    assert sorted(reported) == sorted((s, name, "ok") for s in engine.sessions for name in ("search", "read"))
    assert len(engine.of_type("app_end")) == 20


def test_an_app_for_chat_openai_needs_a_new_import_and_constructor_only(engine: ScriptedEngine) -> None:
    app = """
def run():
    from langchain_core.tools import tool
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    @tool
    def search(q: str) -> str:
        "Search."
        return q

    model = ChatOpenAI(model="fake", base_url=URL, api_key="k", temperature=0.5, max_tokens=64, timeout=10,
                       max_retries=1, model_kwargs={"user": "u"}, extra_body={"top_k": 3})
    bound = model.bind_tools([search])
    graph = StateGraph(MessagesState)
    graph.add_node("agent", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([search]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition, ["tools", END])
    graph.add_edge("tools", "agent")
    return graph.compile().invoke({"messages": [("user", "CALL[search]")]})["messages"]
"""
    moved = app.replace("ChatOpenAI(", "ChatTokencake(")
    answers, bodies = [], []
    for source, line in (
        (app, "from langchain_openai import ChatOpenAI"),
        (moved, "from tokencake_langgraph import ChatTokencake"),
    ):
        engine.reset()
        names: dict[str, Any] = {"URL": engine.base_url}
        exec(f"{line}\n{source}", names)
        answers.append([(message.type, message.text) for message in names["run"]()])
        bodies.append([request.body for request in engine.requests])
    hints = [body.pop("vllm_xargs") for body in bodies[1]]
    for body in (*bodies[0], *bodies[1]):
        del body["messages"]  # ids of tool calls are drawn
    assert answers[0] == answers[1]
    assert bodies[0] == bodies[1]
    assert all(list(hint) == ["tokencake"] for hint in hints)
