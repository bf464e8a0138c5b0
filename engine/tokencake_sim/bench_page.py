"""What does the sweep say? `docs/bench.md`: tables and pictures over the JSON files of the results."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from tokencake_sim.bench_words import INTRO, ON_CPU, POLICIES, RECORDED, WRONG
from tokencake_sim.plots import Axes, gantt, lines, round_up, stacked
from tokencake_sim.published import FORK, FORK_AT_ONE, PAPER_REDUCTION, QPS, Figures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

Metrics = dict[str, Any]


def write_page(results: Path, page: Path) -> None:
    """Write `page` and its pictures from the JSON files in `results`; what was not run is left out."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    runs = [run for run in found.values() if "variant" in run]
    plain = {(run["workload"], run["qps"], run["policy"]): run for run in runs if run["variant"] == "plain"}
    pictures = _pictures(results, plain)
    link = os.path.relpath(results, page.parent)
    sections = [
        INTRO,
        POLICIES,
        _code_writer(plain),
        _validity(plain),
        _on_cpu(found.get("validate_cpu")),
        _versions(found.get("compare_versions")),
        _mechanism(plain),
        _others(plain),
        _robustness(runs),
        _published(plain),
        "\n".join(["## Pictures\n", *(f"![{title}]({link}/{name})\n" for name, title in pictures)]),
        RECORDED,
        WRONG,
    ]
    page.write_text("\n".join(section for section in sections if section), encoding="utf-8")


def _cell(run: Metrics | None) -> str:
    if run is None:
        return "-"
    latency = run["app_latency_s"]
    return f"{run['makespan_s']:.0f} / {latency['mean']:.0f} / {latency['p95']:.0f}"


def _figures(figures: Figures) -> str:
    return f"{figures.makespan_s:.0f} / {figures.mean_s:.0f} / {figures.p95_s:.0f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body, ""])


def _code_writer(plain: dict[tuple[str, float, str], Metrics]) -> str:
    policies = [p for p in ("stock", "stock+host", "priority") if ("code-writer", QPS[-1], p) in plain]
    bounds = [p for p in ("no-recompute", "unlimited") if ("code-writer", QPS[-1], p) in plain]
    rows = [[f"`{p}`", *(_cell(plain.get(("code-writer", qps, p))) for qps in QPS)] for p in policies + bounds]
    rows += [[f"published, {name}", *(_figures(found[qps]) for qps in QPS)] for name, found in FORK.items()]
    title = "## Code-writer: 24 applications, 648 calls, equal distances\n"
    return "\n".join([title, _table(["QPS", *(f"{qps:g}" for qps in QPS)], rows)])


def _errors(run: Metrics, figures: Figures) -> list[float]:
    latency = run["app_latency_s"]
    pairs = (
        (run["makespan_s"], figures.makespan_s),
        (latency["mean"], figures.mean_s),
        (latency["p95"], figures.p95_s),
    )
    return [100 * (ours / theirs - 1) for ours, theirs in pairs]


def _validity(plain: dict[tuple[str, float, str], Metrics]) -> str:
    rows = []
    for qps in QPS:
        run = plain.get(("code-writer", qps, "stock"))
        if run is not None:
            figures = FORK["base"][qps]
            errors = " / ".join(f"{error:+.1f}" for error in _errors(run, figures))
            rows.append([f"{qps:g}", _figures(figures), _cell(run), errors])
    words = "`stock` against the published base of the fork, which is vLLM without it. Fitted at QPS 1.0.\n"
    return "\n".join(["## Is it right?\n", words, _table(["QPS", "published", "here", "error %"], rows)])


def _on_cpu(comparison: Metrics | None) -> str:
    if comparison is None:
        return ""
    rows = [
        [
            str(run["calls"]),
            str(len(run["calls_with_other_hits"])),
            f"{run['hit_tokens']:,}",
            f"{run['real_makespan_s']:.1f}",
            f"{run['simulated_makespan_s']:.1f}",
            f"{100 * run['makespan_error']:+.1f}",
            f"{run['processor_s_per_s']:.2f}",
        ]
        for run in comparison["runs"]
    ]
    head = ["calls", "with other hits", "hit tokens", "real makespan s", "simulated", "error %", "share of a core"]
    return "\n".join(["## Against a real vLLM on a CPU\n", ON_CPU, _table(head, rows)])


def _versions(comparison: Metrics | None) -> str:
    if comparison is None:
        return ""
    rows = [
        [
            f"{run['workload']}, `{run['policy']}`",
            str(run["calls"]),
            str(run["preemptions"]),
            run["differs"] or "nothing",
        ]
        for run in comparison["runs"]
    ]
    words = f"vLLM {' and '.join(comparison['versions'])}: metrics and timelines compared value by value.\n"
    table = _table(["workload", "calls", "preemptions", "what differs"], rows)
    return f"## The same on two versions of vLLM?\n\n{words}\n{table}"


_MECHANISM: Final[tuple[tuple[str, Callable[[Metrics], float], str], ...]] = (
    ("prefill tokens", lambda run: run["prefill_tokens"], ",.0f"),
    ("computed again after preemption", lambda run: run["recomputed_tokens"], ",.0f"),
    ("prefix tokens lost and computed again", lambda run: run["lost_prefix_tokens"], ",.0f"),
    ("device hit tokens", lambda run: run["hit_tokens"]["device"], ",.0f"),
    ("host hit tokens", lambda run: run["hit_tokens"]["host"], ",.0f"),
    ("preemptions", lambda run: run["preemptions"], ".0f"),
    ("critical inversions", lambda run: run["critical_inversions"], ".0f"),
    ("queue, mean s", lambda run: run["queue_s"]["mean"], ".1f"),
    ("first token after a tool, mean s", lambda run: run["ttft_after_tool_s"]["mean"], ".1f"),
    ("call latency, mean s", lambda run: run["call_latency_s"]["mean"], ".1f"),
    ("decode, mean s", lambda run: run["decode_s"]["mean"], ".2f"),
    ("running calls, mean", lambda run: run["mean_running"], ".1f"),
    ("KV occupancy", lambda run: run["kv_occupancy"], ".3f"),
    ("KV held or hit later", lambda run: run["kv_effective_utilisation"], ".3f"),
    ("KV of stalled agents", lambda run: run["kv_held_by_stalled"], ".3f"),
    ("GB to the host", lambda run: run["transfers"]["to_host"]["bytes"] / 1e9, ".1f"),
    ("GB back", lambda run: run["transfers"]["to_device"]["bytes"] / 1e9, ".1f"),
    ("idle while something admissible waited, s", lambda run: run["idle_while_admissible_s"], ".2f"),
)


def _mechanism(plain: dict[tuple[str, float, str], Metrics]) -> str:
    names = ("stock", "stock+host", "priority", "no-recompute", "unlimited")
    runs = {name: plain[key] for name in names if (key := ("code-writer", QPS[-1], name)) in plain}
    if not runs:
        return ""
    rows = []
    for label, value, shown in _MECHANISM:
        theirs = format(FORK_AT_ONE[label], shown) if label in FORK_AT_ONE else ""
        rows.append([label, theirs, *(format(value(run), shown) for run in runs.values())])
    head = ["", "published base", *(f"`{name}`" for name in runs)]
    return "\n".join(["## What happens inside, at QPS 1.0\n", _table(head, rows)])


def _others(plain: dict[tuple[str, float, str], Metrics]) -> str:
    keys = sorted({(workload, qps) for workload, qps, _ in plain if workload != "code-writer"})
    names = ("stock", "stock+host", "priority")
    rows = [[f"{w}, QPS {qps:g}", *(_cell(plain.get((w, qps, name))) for name in names)] for w, qps in keys]
    head = ["workload", *(f"`{name}`" for name in names)]
    return "\n".join(["## Other workloads\n", _table(head, rows)]) if rows else ""


def _robustness(runs: list[Metrics]) -> str:
    varied = {(run["variant"], run["policy"]): run for run in runs if run["variant"] != "plain"}
    variants = sorted({variant for variant, _ in varied})
    rows = [
        [variant, *(_cell(varied.get((variant, name))) for name in ("stock", "stock+host"))] for variant in variants
    ]
    head = ["variation", "`stock`", "`stock+host`"]
    return "\n".join(["## Code-writer at QPS 1.0, varied\n", _table(head, rows)]) if rows else ""


def _published(plain: dict[tuple[str, float, str], Metrics]) -> str:
    rows = []
    for qps in QPS:
        ours = [plain.get(("code-writer", qps, name)) for name in ("stock", "stock+host")]
        base, combined = FORK["base"][qps], FORK["combined"][qps]
        ratios = "-"
        if ours[0] is not None and ours[1] is not None:
            stock, tier = ours[0], ours[1]
            ratios = (
                f"{tier['makespan_s'] / stock['makespan_s']:.2f} / "
                f"{tier['app_latency_s']['mean'] / stock['app_latency_s']['mean']:.2f}"
            )
        theirs = f"{combined.makespan_s / base.makespan_s:.2f} / {combined.mean_s / base.mean_s:.2f}"
        rows.append([f"{qps:g}", theirs, ratios])
    paper = ", ".join(f"{100 * share:.1f} % against {name}" for name, share in PAPER_REDUCTION.items())
    return "\n".join(
        [
            "## What a host tier alone gives, and what has been published\n",
            "End to end and mean latency as a share of stock. The published system has the same host memory.\n",
            _table(["QPS", "published combined / base", "here `stock+host` / `stock`"], rows),
            f"The paper itself reports, in another set-up (20 applications, 1 QPS), a mean latency lower by {paper}.\n",
        ]
    )


# --- pictures -----------------------------------------------------------------------------------

_PICTURED_SAMPLES: Final = 80


def _pictures(results: Path, plain: dict[tuple[str, float, str], Metrics]) -> list[tuple[str, str]]:
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
        for policy in ("stock", "stock+host", "priority")
    }
    shown: dict[str, list[tuple[float, float]]] = {name: list(points) for name, points in latencies.items() if points}
    shown |= {
        f"published {name}": [(p, FORK[name][q].mean_s) for p, q in enumerate(QPS)] for name in ("base", "combined")
    }
    highest = max(y for points in shown.values() for _, y in points)
    title = "Code-writer: mean application latency"
    axes = Axes(title, "applications per second", "seconds", len(QPS) - 1, round_up(highest), [f"{q:g}" for q in QPS])
    write("latency.svg", title, lines(axes, shown, dashed=[name for name in shown if name.startswith("published")]))
    for policy in ("stock", "stock+host"):
        path = results / f"code-writer_1_{policy.replace('+', '-with-')}_plain.timeline.json"
        if path.exists():
            _timeline_pictures(policy, json.loads(path.read_text()), write)
    return written


def _timeline_pictures(policy: str, timeline: Metrics, write: Callable[[str, str, str], None]) -> None:
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
