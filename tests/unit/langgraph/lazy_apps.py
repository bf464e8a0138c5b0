"""Apps that create their models while they run. Each function returns a callable that runs its app once."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import operator
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.callbacks import CallbackManager
from langchain_core.callbacks.stdout import StdOutCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, Send, interrupt

HELLO = {"messages": [("user", "hello")]}
SEARCH_FIRST = {"messages": [("user", "CALL[search]")]}

App = Callable[[], Any]
url = ""


@tool
def search(q: str) -> str:
    """Search."""
    return f"found {q}"


def make(**settings: Any) -> ChatOpenAI:
    """The model, found by its class's name as in `load_chat_model("provider/model")` of the templates."""
    chat_model = importlib.import_module("tokencake_langgraph").ChatTokencake
    model: ChatOpenAI = chat_model(model="fake", base_url=url, max_retries=0, **settings)
    return model


def say(state: Any) -> dict[str, Any]:
    return {"messages": [make().invoke("hello")]}


async def asay(state: Any) -> dict[str, Any]:
    return {"messages": [await make().ainvoke("hello")]}


def graph_of(name: str, **nodes: Any) -> CompiledStateGraph:
    """Nodes one after the other."""
    graph = StateGraph(MessagesState)
    for node, run in nodes.items():
        graph.add_node(node, run)
    for before, after in itertools.pairwise([START, *nodes]):
        graph.add_edge(before, after)
    return graph.compile(name=name)


def react_template(**settings: Any) -> CompiledStateGraph:
    """The official template: `call_model` makes its model each time."""

    async def call_model(state: MessagesState) -> dict[str, Any]:
        model = make(**settings).bind_tools([search])
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("call_model", call_model)
    graph.add_node("tools", ToolNode([search]))
    graph.add_edge(START, "call_model")
    graph.add_conditional_edges("call_model", tools_condition)
    graph.add_edge("tools", "call_model")
    return graph.compile(name="ReAct Agent")


def asking_for(tool_name: str) -> GenericFakeChatModel:
    """Another vendor's model: it asks for one tool and then answers, again and again."""

    class Fake(GenericFakeChatModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self

    def answers() -> Iterator[AIMessage]:
        while True:
            yield AIMessage(
                "", tool_calls=[{"name": tool_name, "args": {"q": "x"}, "id": "call_1", "type": "tool_call"}]
            )
            yield AIMessage("done")

    return Fake(messages=answers())


def in_each_node() -> App:
    graph = graph_of("app", a=say, b=say, c=say)
    return lambda: graph.invoke(HELLO)


def in_a_node_of_the_react_template() -> App:
    graph = react_template()
    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(graph.ainvoke(SEARCH_FIRST))


def in_a_new_event_loop_each_time() -> App:
    import openai

    async def play() -> Any:
        graph = react_template(http_async_client=openai.DefaultAsyncHttpxClient())
        return [chunk async for chunk in graph.astream(SEARCH_FIRST, stream_mode="messages")]

    return lambda: asyncio.run(play())


def in_parallel_async_nodes() -> App:
    graph = StateGraph(MessagesState)
    for node in "ab":
        graph.add_node(node, asay)
        graph.add_edge(START, node)
    graph.add_node("join", asay)
    graph.add_edge(["a", "b"], "join")
    compiled = graph.compile(name="app")
    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(compiled.ainvoke(HELLO))


def in_a_node_with_a_timeout() -> App:
    graph = StateGraph(MessagesState)
    graph.add_node("a", asay, timeout=60.0)
    graph.add_node("b", asay)
    graph.add_edge(START, "a")
    graph.add_edge("a", "b")
    compiled = graph.compile(name="app")
    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(compiled.ainvoke(HELLO))


def in_a_streamed_run() -> App:
    graph = graph_of("app", a=say, b=say)
    return lambda: list(graph.stream(HELLO, stream_mode=["messages", "updates"]))


def in_a_batch() -> App:
    graph = graph_of("app", a=say, b=say)
    return lambda: graph.batch([HELLO, HELLO])


def in_two_event_loops_at_once() -> App:
    import openai

    def play() -> None:
        graph = react_template(http_async_client=openai.DefaultAsyncHttpxClient())
        asyncio.run(graph.ainvoke(SEARCH_FIRST))

    def both() -> None:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(play) for _ in range(2)]:
                done.result()

    return both


def in_a_tool() -> App:
    @tool
    def ask(q: str) -> str:
        """Ask."""
        return make().invoke(q).text

    agent = create_agent(asking_for("ask"), [ask], name="boss")
    return lambda: agent.invoke(HELLO)


def in_a_sub_agent_of_a_tool() -> App:
    @tool
    def research(q: str) -> str:
        """Research."""
        return create_agent(make(), [search], name="helper").invoke(SEARCH_FIRST)["messages"][-1].text

    agent = create_agent(asking_for("research"), [research], name="boss")
    return lambda: agent.invoke(HELLO)


def in_an_agent_made_in_a_node() -> App:
    graph = graph_of("app", team=lambda _: create_agent(make(), [search], name="worker").invoke(SEARCH_FIRST), last=say)
    return lambda: graph.invoke(HELLO)


def in_a_subgraph() -> App:
    graph = graph_of("outer", inner=graph_of("inner", deep=graph_of("deep", a=say, b=say), c=say), last=say)
    return lambda: graph.invoke(HELLO)


def in_a_subgraph_called_by_a_function() -> App:
    inner = graph_of("inner", a=say, b=say)
    graph = graph_of("outer", caller=inner.invoke, last=say)
    return lambda: graph.invoke(HELLO)


def after_a_subgraph() -> App:
    inner = graph_of("inner", quiet=lambda _: {})
    graph = graph_of("outer", first=inner, then=say, last=inner)
    return lambda: graph.invoke(HELLO)


def in_tasks_of_the_functional_api() -> App:
    @task
    def think(number: int) -> str:
        return make().invoke(f"think {number}").text

    @entrypoint()
    def flow(_: Any) -> list[str]:
        return [think(1).result(), think(2).result(), make().invoke("so?").text]

    return lambda: flow.invoke({})


def in_branches_of_send() -> App:
    class State(TypedDict):
        messages: Annotated[list[Any], operator.add]

    graph = StateGraph(State)
    graph.add_node("work", say)
    graph.add_conditional_edges(START, lambda _: [Send("work", {}) for _ in range(3)], ["work"])
    compiled = graph.compile(name="app")
    return lambda: compiled.invoke({"messages": []})


def in_a_router() -> App:
    graph = StateGraph(MessagesState)
    graph.add_node("a", lambda _: {})
    graph.add_node("b", say)
    graph.add_edge(START, "a")
    graph.add_conditional_edges("a", lambda _: "b" if make().invoke("where to?") else END, ["b", END])
    compiled = graph.compile(name="app")
    return lambda: compiled.invoke(HELLO)


def in_a_middleware_that_swaps_the_model() -> App:
    class Swap(AgentMiddleware):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(model=make()))

    agent = create_agent(asking_for("search"), [search], middleware=[Swap()], name="worker")
    return lambda: agent.invoke(SEARCH_FIRST)


def in_a_thread_pool_with_context() -> App:
    def fan(_: Any) -> dict[str, Any]:
        with ContextThreadPoolExecutor(2) as pool:
            return {"messages": list(pool.map(lambda text: make().invoke(text), ["one", "two"]))}

    graph = graph_of("app", fan=fan, last=say)
    return lambda: graph.invoke(HELLO)


def below_a_manager_made_by_the_user() -> App:
    graph = graph_of("app", a=say, b=say)
    return lambda: graph.invoke(HELLO, {"callbacks": CallbackManager([StdOutCallbackHandler()])})


def before_and_after_an_interrupt() -> App:
    graph = StateGraph(MessagesState)
    graph.add_node("a", say)
    graph.add_node("ask", lambda _: {"messages": [("user", interrupt("go on?"))]})
    graph.add_node("b", say)
    for before, after in zip((START, "a", "ask"), ("a", "ask", "b"), strict=True):
        graph.add_edge(before, after)
    compiled = graph.compile(name="app", checkpointer=InMemorySaver())
    threads = iter("12")

    def play() -> None:
        config: Any = {"configurable": {"thread_id": next(threads)}}
        compiled.invoke(HELLO, config)
        compiled.invoke(Command(resume="yes"), config)

    return play


def in_a_node_that_fails() -> App:
    def fail(state: Any) -> dict[str, Any]:
        say(state)
        raise RuntimeError("as scripted")

    graph = graph_of("app", a=fail)

    def play() -> None:
        try:
            graph.invoke(HELLO)
        except RuntimeError:
            return

    return play


def after_the_package_is_loaded_anew() -> App:
    make()
    for name in [name for name in sys.modules if name.startswith("tokencake_langgraph")]:
        del sys.modules[name]
    return in_a_node_of_the_react_template()


def after_each_module_is_reloaded() -> App:
    make()
    for name in [name for name in sys.modules if name.startswith("tokencake_langgraph")]:
        importlib.reload(sys.modules[name])
    return in_a_node_of_the_react_template()


def after_the_handler_is_reloaded() -> App:
    make()
    importlib.reload(sys.modules["tokencake_langgraph.handler"])
    importlib.reload(sys.modules["tokencake_langgraph"])
    return in_a_node_of_the_react_template()


def in_a_chain_without_a_graph() -> App:
    chain = RunnableLambda(lambda text: text) | RunnableLambda(lambda _: make()) | RunnableLambda(lambda _: say({}))
    return lambda: chain.invoke("hello")


def in_a_thread_without_context() -> App:
    def fan(_: Any) -> dict[str, Any]:
        with ThreadPoolExecutor(1) as pool:
            return {"messages": [pool.submit(lambda: make().invoke("one")).result()]}

    graph = graph_of("app", fan=fan)
    return lambda: graph.invoke(HELLO)
