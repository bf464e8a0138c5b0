"""Pictures of the sweep: latency against load, the KV cache over time, the calls of one application."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from benchmarks.report.plots import Axes, gantt, lines, round_up, stacked
from benchmarks.report.published import FORK, QPS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Metrics = dict[str, Any]

LINES: Final = ("stock", "stock+host", "paper", "default")
"""Policies of the latency picture."""
OVER_TIME: Final = ("stock", "stock+host", "default")
"""Policies whose run at the highest rate is shown over time."""
_PICTURED_SAMPLES: Final = 80


def draw(results: Path, plain: dict[tuple[str, float, str], Metrics]) -> list[tuple[str, str]]:
    """Write the pictures into `results`; returns file name and title of each."""
    written: list[tuple[str, str]] = []

    def write(name: str, title: str, svg: str) -> None:
        (results / name).write_text(svg, encoding="utf-8")
        written.append((name, title))

    latencies = {
        policy: [
            (place, plain[key]["app_latency_s"]["mean"])
            for place, qps in enumerate(QPS)
            if (key := ("code-writer", qps, policy)) in plain
        ]
        for policy in LINES
    }
    shown: dict[str, list[tuple[float, float]]] = {name: list(points) for name, points in latencies.items() if points}
    shown |= {
        f"published {name}": [(p, FORK[name][q].mean_s) for p, q in enumerate(QPS)] for name in ("base", "combined")
    }
    highest = max(y for points in shown.values() for _, y in points)
    title = "Code-writer: mean application latency"
    axes = Axes(title, "applications per second", "seconds", len(QPS) - 1, round_up(highest), [f"{q:g}" for q in QPS])
    write("latency.svg", title, lines(axes, shown, dashed=[name for name in shown if name.startswith("published")]))
    for policy in OVER_TIME:
        path = results / f"code-writer_1_{policy.replace('+', '-with-')}_plain.timeline.json"
        if path.exists():
            _over_time(policy, json.loads(path.read_text()), write)
    return written


def _over_time(policy: str, timeline: Metrics, write: Callable[[str, str, str], None]) -> None:
    samples = _thinned(timeline["kv"])
    kinds = {"running": "running", "pinned": "copied", "stalled": "stalled, cached", "other_cached": "other, cached"}
    series = {label: [(s["time_s"], s[kind]) for s in samples] for kind, label in kinds.items()}
    name = policy.replace("+", "-with-")
    title = f"KV blocks over time, code-writer at QPS 1.0, {policy}"
    axes = Axes(title, "seconds", "share of the blocks", round_up(samples[-1]["time_s"]), 1.0)
    write(f"kv-{name}.svg", title, stacked(axes, series))
    app = timeline["calls"][0]["app"]
    calls = [call for call in timeline["calls"] if call["app"] == app]
    title = f"The first application, {policy}"
    write(f"gantt-{name}.svg", title, gantt(title, calls))


def _thinned(samples: list[Metrics]) -> list[Metrics]:
    """Means of neighbouring samples, few enough to be told apart in a picture."""
    size = -(-len(samples) // _PICTURED_SAMPLES)
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [{key: sum(sample[key] for sample in part) / len(part) for key in part[0]} for part in parts]
