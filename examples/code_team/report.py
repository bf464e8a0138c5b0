"""The figures of the demo, read from the engine's `/v1/tokencake/state` and `/metrics`."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.table import Table

_MIB: Final = 1 << 20
_SUMS: Final = ("calls", "prompt_tokens", "cached_tokens", "output_tokens", "tool_calls", "stall_s", "queue_s")


def summarise(state: dict[str, Any]) -> dict[str, Any]:
    """Figures per agent and in total; times in seconds."""
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
    result = Table(title="What the engine recorded for each agent", box=box.SIMPLE)
    result.add_column("agent", no_wrap=True)
    for column in ("LLM calls", "prompt", "cached", "output", "tool calls", "stalled", "queued"):
        result.add_column(column, justify="right")
    for name, row in summary["agents"].items():
        cached = f"{row['cached_tokens'] / max(1, row['prompt_tokens']):.0%}"
        counts = (row["calls"], row["prompt_tokens"], cached, row["output_tokens"], row["tool_calls"])
        result.add_row(name, *map(str, counts), f"{row['stall_s']:.1f} s", f"{row['queue_s']:.1f} s")
    return result


def read_metrics(text: str) -> dict[str, Any]:
    """Metrics that every vLLM has, and under `kv` TokenCake's actions on KV blocks."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
            labels = [f"{name}={value}" for name, value in sample.labels.items() if name in ("action", "by", "outcome")]
            for label in labels:
                found[f"{sample.name} {label}"] += sample.value
    return {
        "computed_tokens": int(found["vllm:prompt_tokens_total"] - found["vllm:prompt_tokens_cached_total"]),
        "ttft_s": found["vllm:time_to_first_token_seconds_sum"]
        / max(1, found["vllm:time_to_first_token_seconds_count"]),
        "kv": {
            "offloads": int(found["tokencake:kv_decisions_total action=offload"]),
            "uploads_used": int(found["tokencake:kv_uploads_total outcome=used"]),
            "loads": int(found["tokencake:kv_loads_total outcome=queued"]),
            "copied_mib": found["tokencake:kv_copied_bytes_total"] / _MIB,
            "saved_tokens": int(found["tokencake:kv_tokens_saved_total"]),
        },
    }


def kv_summary(summary: dict[str, Any]) -> str:
    """A sentence about the KV cache of the stalled agents."""
    kv = summary["kv"]
    stalled_s = sum(stall["seconds"] or 0.0 for stall in summary["stalls"])
    return (
        f"{summary['llm_calls']} LLM calls, {summary['tool_calls']} tool calls; agents were stalled in tools for "
        f"{stalled_s:.1f} s. {kv['offloads']} times the KV cache of an agent went to host memory, {kv['uploads_used']} "
        f"times it was back before the agent, {kv['loads']} times it was loaded when the agent called; "
        f"{kv['copied_mib']:.0f} MiB were copied and {kv['saved_tokens']} tokens not computed again."
    )


def comparison(tokencake: dict[str, Any], stock: dict[str, Any]) -> Table:
    """Comparison with the same tasks on stock vLLM, which has the same KV memory on the device and ran afterwards."""
    result = Table(title="The same tasks on stock vLLM", box=box.SIMPLE)
    for column in ("", "stock", "TokenCake", "ratio"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)

    def row(name: str, theirs: float, mine: float, unit: str, digits: int) -> None:
        ratio = f"{mine / theirs:.2f}" if theirs else "-"
        result.add_row(name, f"{theirs:.{digits}f}{unit}", f"{mine:.{digits}f}{unit}", ratio)

    row("prompt tokens computed", stock["computed_tokens"], tokencake["computed_tokens"], "", 0)
    row("first token, mean", stock["ttft_s"], tokencake["ttft_s"], " s", 2)
    row("task, mean", fmean(stock["task_s"]), fmean(tokencake["task_s"]), " s", 1)
    row("all tasks", stock["wall_s"], tokencake["wall_s"], " s", 1)
    return result


def progress(state: dict[str, Any]) -> Table:
    """The current state of each session."""
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
