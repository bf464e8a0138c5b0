"""Graphs and tools of the tests."""

from __future__ import annotations

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool

THREAD: RunnableConfig = {"configurable": {"thread_id": "T"}}
HELLO = {"messages": [("user", "hello")]}


@tool
def search(q: str) -> str:
    """Search."""
    return f"found {q}"


@tool
def read(q: str) -> str:
    """Read."""
    return f"text of {q}"
