"""Agents with tools that fail, block or ask a human."""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, tool

from tokencake_langgraph import ChatTokencake

THREAD: RunnableConfig = {"configurable": {"thread_id": "T"}}
HELLO = {"messages": [("user", "hello")]}


@tool
def quick(q: str) -> str:
    """Quick."""
    return q


def agent(model: ChatTokencake, *tools: BaseTool, **settings: Any) -> Any:
    names = ",".join(tool.name for tool in tools)
    return create_agent(model, list(tools), system_prompt=f"CALL[{names}]", name="a", **settings)
