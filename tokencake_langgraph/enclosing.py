"""The runs that enclose the current code, read from LangChain's and LangGraph's context variables.

Callbacks name the parent of a run, but not every parent was reported: the graph may have started before this package
was imported, or the parent is a run of a tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple
from uuid import UUID

from langchain_core.callbacks.manager import BaseRunManager
from langchain_core.runnables.config import RunnableConfig, var_child_runnable_config

MAX_DEPTH: Final = 64
"""Levels of nested graphs that are followed outwards."""

_CALL: Final = "__pregel_call"
"""LangGraph's key in `configurable` for the function that schedules a task in the running graph."""


class GraphRun(NamedTuple):
    """A run of a LangGraph graph that has not ended."""

    manager: BaseRunManager
    name: str | None


def enclosing_run() -> tuple[UUID | None, Mapping[str, Any]]:
    """The run that the current code belongs to, and its metadata, for code without a callback manager.

    `llm.generate()` and plain code in a node get no config; LangChain keeps the node's config in a context variable.
    """
    config: RunnableConfig | None = var_child_runnable_config.get()
    if config is None:
        return None, {}
    return getattr(config.get("callbacks"), "parent_run_id", None), config.get("metadata") or {}


def enclosing_graphs() -> list[GraphRun]:
    """The graph runs that enclose the current code, the innermost first; empty outside LangGraph.

    LangGraph has no public path from a node to its graph. Where a version changes the private one, the list ends early.
    """
    graphs: list[GraphRun] = []
    config: Any = var_child_runnable_config.get()
    while config and len(graphs) < MAX_DEPTH:
        call = _partial((config.get("configurable") or {}).get(_CALL))
        # The futures of a step exist as long as the step.
        if call is None or call.keywords["futures"]() is None:
            break
        loop = call.keywords["schedule_task"].__self__
        if not isinstance(loop.manager, BaseRunManager):
            break
        graph = getattr(loop._migrate_checkpoint, "__self__", None)  # noqa: SLF001 - the loop's only reference to its graph
        graphs.append(GraphRun(loop.manager, loop.config.get("run_name") or (graph and graph.get_name())))
        config = loop.config
    return graphs


def _partial(call: Callable[..., Any] | None) -> partial[Any] | None:
    """The `partial` that LangGraph made; for a node with a timeout it is inside a closure."""
    while call is not None and not isinstance(call, partial):
        cells = (cell.cell_contents for cell in getattr(call, "__closure__", None) or ())
        call = next((content for content in cells if callable(content)), None)
    return call
