"""The team: an architect, three parallel programmers and a reviewer.

This is an ordinary LangGraph app: only the line that creates the model refers to TokenCake. A model of 135 million
parameters does not choose tools by itself, so the *choice* is scripted (`tool_choice`); the arguments, the text and the
tool durations are real.
"""

from __future__ import annotations

import operator
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Send

from code_team.tools import programmer_tools

PROGRAMMERS: Final = 3
_STEPS: Final = ("search_docs", "write_file", "run_tests")
_PARTS: Final = ("the core logic", "the input checks", "the command line")


class TeamState(TypedDict):
    """The state of one task."""

    task: str
    plan: str
    reports: Annotated[list[str], operator.add]
    review: str


class ProgrammerState(MessagesState):
    """The conversation of one programmer."""


def build_team(model: ChatOpenAI, scratch: Path) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The compiled graph; programmers work in folders below `scratch`."""

    async def architect(state: TeamState) -> dict[str, Any]:
        answer = await model.bind(max_tokens=64).ainvoke(
            [
                SystemMessage("You are a software architect. You plan small Python programs in a few sentences."),
                HumanMessage(f"Plan this program: {state['task']}"),
            ]
        )
        return {"plan": answer.text}

    def assign(state: TeamState) -> list[Send]:
        return [
            Send("programmer", {"messages": _assignment(state["task"], state["plan"], part)})
            for part in _PARTS[:PROGRAMMERS]
        ]

    async def programmer(state: ProgrammerState) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        result = await _programmer(model, folder).ainvoke({"messages": state["messages"]})
        return {"reports": [result["messages"][-1].text]}

    async def reviewer(state: TeamState) -> dict[str, Any]:
        reports = "\n\n".join(state["reports"])
        answer = await model.bind(max_tokens=64).ainvoke(
            [
                SystemMessage("You review Python programs. You are short and kind."),
                HumanMessage(f"The task was: {state['task']}\n\nThe programmers report:\n{reports}\n\nYour review:"),
            ]
        )
        return {"review": answer.text}

    team = StateGraph(TeamState)
    team.add_node("architect", architect)
    team.add_node("programmer", programmer)
    team.add_node("reviewer", reviewer)
    team.add_edge(START, "architect")
    team.add_conditional_edges("architect", assign, ["programmer"])
    team.add_edge("programmer", "reviewer")
    team.add_edge("reviewer", END)
    return team.compile(name="code-team")


def _assignment(task: str, plan: str, part: str) -> list[Any]:
    return [
        SystemMessage(
            "You are a careful Python programmer in a team. You look things up in the documentation before you write, "
            "you write short modules with clear names, and you run the unit tests before you report."
        ),
        HumanMessage(f"The program: {task}\n\nThe architect's plan: {plan}\n\nYour part: {part}."),
    ]


def _programmer(model: ChatOpenAI, folder: Path) -> CompiledStateGraph[Any, Any, Any, Any]:
    tools = programmer_tools(folder)

    async def call_model(state: ProgrammerState) -> dict[str, Any]:
        done = sum(message.type == "tool" for message in state["messages"])
        choice = _STEPS[done] if done < len(_STEPS) else "none"
        bound = model.bind_tools(tools, tool_choice=choice, strict=True).bind(
            max_tokens=160 if done < len(_STEPS) else 48
        )
        return {"messages": [await bound.ainvoke(state["messages"])]}

    def route(state: ProgrammerState) -> str:
        return "tools" if getattr(state["messages"][-1], "tool_calls", None) else END

    loop = StateGraph(ProgrammerState)
    loop.add_node("model", call_model)
    loop.add_node("tools", ToolNode(tools))
    loop.add_edge(START, "model")
    loop.add_conditional_edges("model", route, ["tools", END])
    loop.add_edge("tools", "model")
    return loop.compile(name="programmer")
