"""Overhead of `ChatTokencake` over `ChatOpenAI` for one LLM call.

Both call the same fake transport from a node of the same LangGraph graph, turn about, so that whatever else the machine
does hits both; `ChatOpenAI` runs without our handler. One run is one LLM call that asks for a tool, and that tool: one
hint and three events. The events go to a transport that swallows them; nothing leaves the process.

```
python benchmarks/client_overhead.py [--json FILE] [--calls N]
```
`added_median_ms` is what the caller waits for; `added_cpu_ms` has the sender's thread in it as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import langchain_core
import openai
from langchain_core.tools import tool
from langchain_core.tracers.context import _configure_hooks
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from tokencake_langgraph import ChatTokencake, TokencakeHandler, flush, senders, stats
from tokencake_langgraph.sender import EventSender

LIMIT_MS = 0.3
WARM_UP_CALLS = 50
BLOCK_CALLS = 50

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "fake",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}
                ],
            },
        }
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
}


@tool
def search(q: str) -> str:
    """Search."""
    return q


def make_app(model: ChatOpenAI) -> Callable[[], Any]:
    """A graph of one node that calls the model once and then the tool it asks for."""
    bound = model.bind_tools([search])

    def work(state: MessagesState) -> dict[str, Any]:
        answer = bound.invoke(state["messages"])
        return {"messages": [answer, search.invoke(answer.tool_calls[0])]}

    graph = StateGraph(MessagesState)
    graph.add_node("work", work)
    graph.add_edge(START, "work")
    app: Any = graph.compile()  # its type wants the state as it is inside the graph
    return lambda: app.invoke({"messages": [("user", "hello")]})


def without_handler(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as it is in a process that never made a `ChatTokencake`."""
    (hook,) = [var for var, _, handler, _ in _configure_hooks if handler is TokencakeHandler]

    def bare() -> None:
        token = hook.set(None)
        try:
            run()
        finally:
            hook.reset(token)

    return bare


def make_apps() -> dict[str, Callable[[], Any]]:
    """Both apps, on one HTTP client that answers without a network."""
    # Which library that has to be depends on the version of openai.
    http = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    content, headers = json.dumps(ANSWER).encode(), {"Content-Type": "application/json"}
    client = http.Client(transport=http.MockTransport(lambda _: http.Response(200, content=content, headers=headers)))
    swallow = httpx.MockTransport(lambda _: httpx.Response(200))
    vars(senders)["EventSender"] = lambda target: EventSender(target, transport=swallow)
    settings = {"model": "fake", "base_url": "http://fake/v1", "api_key": "key", "http_client": client}
    tokencake = make_app(ChatTokencake(**settings))
    return {"openai": without_handler(make_app(ChatOpenAI(**settings))), "tokencake": tokencake}


def wall_ms(apps: dict[str, Callable[[], Any]], calls: int) -> dict[str, list[float]]:
    """Time of each run, the apps taking turns."""
    times: dict[str, list[float]] = {name: [] for name in apps}
    for _ in range(calls):
        for name, run in apps.items():
            start_s = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start_s) * 1e3)
    return times


def cpu_ms(run: Callable[[], Any]) -> float:
    """CPU time of the process for one run, its events delivered, averaged over a block."""
    start_s = time.process_time()
    for _ in range(BLOCK_CALLS):
        run()
    flush()
    return (time.process_time() - start_s) * 1e3 / BLOCK_CALLS


def measure(calls: int) -> dict[str, Any]:
    """Medians of both, in milliseconds per run of the graph."""
    apps = make_apps()
    wall_ms(apps, WARM_UP_CALLS)
    gc.collect()
    times = wall_ms(apps, calls)
    blocks = [{name: cpu_ms(run) for name, run in apps.items()} for _ in range(max(calls // BLOCK_CALLS, 3))]
    added = [mine - other for mine, other in zip(times["tokencake"], times["openai"], strict=True)]
    low, middle, high = statistics.quantiles(added, n=4)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "calls": calls,
        "chat_openai_median_ms": round(medians["openai"], 4),
        "chat_tokencake_median_ms": round(medians["tokencake"], 4),
        "difference_of_medians_ms": round(medians["tokencake"] - medians["openai"], 4),
        "ratio_of_medians": round(medians["tokencake"] / medians["openai"], 4),
        "added_median_ms": round(middle, 4),
        "added_quartiles_ms": [round(low, 4), round(high, 4)],
        "added_cpu_ms": round(statistics.median(block["tokencake"] - block["openai"] for block in blocks), 4),
        "limit_ms": LIMIT_MS,
        "is_within_limit": middle < LIMIT_MS,
        "events_sent": sum(target.sent for target in stats()),
        "load_average": round(os.getloadavg()[0], 2),  # above 1, the figures are those of a machine that is shared
        "python": platform.python_version(),
        "langchain_core": langchain_core.__version__,
        "openai": openai.__version__,
    }


def main() -> int:
    """Measure, print, and fail above the limit."""
    parser = argparse.ArgumentParser(description="Cost of ChatTokencake per LLM call against ChatOpenAI.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--calls", type=int, default=1_000, metavar="N", help="runs of each app (default: 1000)")
    arguments = parser.parse_args()
    figures = measure(arguments.calls)
    for name, value in figures.items():
        print(f"{name:26} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["is_within_limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
