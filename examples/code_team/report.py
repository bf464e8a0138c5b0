"""What did the engine see? Everything here is read from the engine's own state, `GET /v1/tokencake/state`."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

_SUMS = ("calls", "prompt_tokens", "cached_tokens", "output_tokens", "tool_calls", "stall_s", "queue_s")


def summarise(state: dict[str, Any]) -> dict[str, Any]:
    """Figures per agent and in all; times in seconds."""
    agents: dict[str, dict[str, float]] = {}
    stalls: list[dict[str, Any]] = []
    for call in state["calls"]:
        name = call["agent"] or "unknown"
        row = agents.setdefault(name, dict.fromkeys(_SUMS, 0))
        row["calls"] += 1
        row["prompt_tokens"] += call["prompt_tokens"]
        row["cached_tokens"] += sum(call["cached_tokens"].values())
        row["output_tokens"] += call["output_tokens"]
        row["queue_s"] += call["queue_s"] or 0.0
        for tool in call["tools"]:
            row["tool_calls"] += 1
            row["stall_s"] += tool["duration_s"] or 0.0
            stalls.append({"agent": name, "tool": tool["tool"], "seconds": tool["duration_s"]})
    total = {key: sum(row[key] for row in agents.values()) for key in _SUMS}
    return {
        "llm_calls": total["calls"],
        "tool_calls": total["tool_calls"],
        "agents": agents,
        "prompt_tokens": total["prompt_tokens"],
        "cached_tokens": total["cached_tokens"],
        "stalls": stalls,
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary, a row for each agent."""
    result = Table(title="What the engine knew of each agent", box=box.SIMPLE)
    result.add_column("agent", no_wrap=True)
    for column in ("LLM calls", "prompt", "cached", "output", "tool calls", "stalled", "queued"):
        result.add_column(column, justify="right")
    for name, row in summary["agents"].items():
        cached = f"{row['cached_tokens'] / max(1, row['prompt_tokens']):.0%}"
        counts = (row["calls"], row["prompt_tokens"], cached, row["output_tokens"], row["tool_calls"])
        result.add_row(name, *map(str, counts), f"{row['stall_s']:.1f} s", f"{row['queue_s']:.1f} s")
    return result


def progress(state: dict[str, Any]) -> Table:
    """What each session does right now."""
    result = Table(title="Agents, as the engine sees them", box=box.SIMPLE)
    for column in ("application", "agent", "status", "in tool"):
        result.add_column(column)
    result.add_column("calls", justify="right")
    names = {app: f"task {number}" for number, app in enumerate(state["apps"], start=1)}
    calls: dict[str, list[dict[str, Any]]] = {}
    for call in state["calls"]:
        calls.setdefault(call["session"], []).append(call)
    for session_id, session in state["sessions"].items():
        mine = calls.get(session_id, [])
        open_tools = [tool["tool"] for call in mine for tool in call["tools"] if tool["end"] is None]
        app = names.get(session["app"], "")
        result.add_row(app, session["agent"], session["status"], ", ".join(open_tools), str(len(mine)))
    return result
