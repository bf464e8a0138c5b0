"""`docs/bench.md`: tables and pictures from the JSON files of the results."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from benchmarks.report.pictures import draw
from benchmarks.report.published import FORK, FORK_AT_ONE, PAPER_REDUCTION, QPS, Figures
from benchmarks.report.words import CALIBRATED, INTRO, ON_CPU, ON_SERVER, POLICIES, RECORDED, WRONG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

Metrics = dict[str, Any]
Runs = dict[tuple[str, float, str], Metrics]
"""By workload, rate and policy."""

PARTS: Final = ("priority", "time", "space", "space+host")
"""Policies at some rates of the published sweep."""
BOUNDS: Final = ("no-recompute", "unlimited")
COMPARED: Final = ("stock", "stock+host", "paper", "default")
"""Policies on every workload and variation."""
VARIED: Final = ("stock+host", "time", "default")
"""Policies on the variations of code-writer."""
TTFT: Final = ("stock+host", "time", "default")
"""Policies whose first tokens after a tool are compared."""


def write_page(results: Path, page: Path) -> None:
    """Write `page` and its pictures from the JSON files in `results`; what was not run is left out."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    runs = [run for run in found.values() if "variant" in run]
    plain = {(run["workload"], run["qps"], run["policy"]): run for run in runs if run["variant"] == "plain"}
    pictures = draw(results, plain)
    link = os.path.relpath(results, page.parent)
    sections = [
        INTRO,
        POLICIES,
        _code_writer(plain),
        _validity(plain),
        _against("Against a real vLLM on a CPU", ON_CPU, found.get("validate_cpu")),
        _against("Against a real server on a CPU", ON_SERVER, found.get("validate_server")),
        _versions(found.get("compare_versions")),
        _mechanism(plain),
        _others(plain),
        _kinds(plain),
        _shielding(plain),
        _robustness(runs),
        _after_tools(runs),
        _published(plain),
        "\n".join(["## Pictures\n", *(f"![{title}]({link}/{name})\n" for name, title in pictures)]),
        RECORDED,
        CALIBRATED,
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


def _code_writer(plain: Runs) -> str:
    policies = [p for p in (*COMPARED, *PARTS, *BOUNDS) if ("code-writer", QPS[-1], p) in plain]
    rows = [[f"`{p}`", *(_cell(plain.get(("code-writer", qps, p))) for qps in QPS)] for p in policies]
    rows += [[f"published, {name}", *(_figures(found[qps]) for qps in QPS)] for name, found in FORK.items()]
    title = "## Code-writer: 24 applications, 648 calls, equal distances\n"
    head = ["QPS", *(f"{qps:g}" for qps in QPS)]
    ratios = [
        [
            f"`default` / `{base}`",
            *(_ratio(plain.get(("code-writer", qps, "default")), plain.get(("code-writer", qps, base))) for qps in QPS),
        ]
        for base in COMPARED[:-1]
    ]
    return "\n".join([title, _table(head, rows), "As ratios:\n", _table(head, ratios)])


def _ratio(run: Metrics | None, base: Metrics | None) -> str:
    if run is None or base is None:
        return "-"
    mine, its = run["app_latency_s"], base["app_latency_s"]
    pairs = ((run["makespan_s"], base["makespan_s"]), (mine["mean"], its["mean"]), (mine["p95"], its["p95"]))
    return " / ".join(f"{value / of:.2f}" for value, of in pairs)


def _published_ratio(qps: float) -> str:
    base, combined = FORK["base"][qps], FORK["combined"][qps]
    pairs = (
        (combined.makespan_s, base.makespan_s),
        (combined.mean_s, base.mean_s),
        (combined.p95_s, base.p95_s),
    )
    return " / ".join(f"{value / of:.2f}" for value, of in pairs)


def _errors(run: Metrics, figures: Figures) -> list[float]:
    latency = run["app_latency_s"]
    pairs = (
        (run["makespan_s"], figures.makespan_s),
        (latency["mean"], figures.mean_s),
        (latency["p95"], figures.p95_s),
    )
    return [100 * (ours / theirs - 1) for ours, theirs in pairs]


def _validity(plain: Runs) -> str:
    rows = []
    for qps in QPS:
        run = plain.get(("code-writer", qps, "stock"))
        if run is not None:
            figures = FORK["base"][qps]
            errors = " / ".join(f"{error:+.1f}" for error in _errors(run, figures))
            rows.append([f"{qps:g}", _figures(figures), _cell(run), errors])
    words = "`stock` against the published base of the fork, which is vLLM without it. Fitted at QPS 1.0.\n"
    return "\n".join(["## Is it right?\n", words, _table(["QPS", "published", "here", "error %"], rows)])


def _against(title: str, words: str, comparison: Metrics | None) -> str:
    """Runs of a real vLLM beside the same in virtual time."""
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
        ]
        for run in comparison["runs"]
    ]
    head = ["calls", "with other hits", "hit tokens", "real makespan s", "simulated", "error %"]
    return "\n".join([f"## {title}\n", words, _table(head, rows)])


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


def _mechanism(plain: Runs) -> str:
    names = ("stock", "stock+host", "paper", "time", "space", "default", *BOUNDS)
    runs = {name: plain[key] for name in names if (key := ("code-writer", QPS[-1], name)) in plain}
    if not runs:
        return ""
    rows = []
    for label, value, shown in _MECHANISM:
        theirs = format(FORK_AT_ONE[label], shown) if label in FORK_AT_ONE else ""
        rows.append([label, theirs, *(format(value(run), shown) for run in runs.values())])
    head = ["", "published base", *(f"`{name}`" for name in runs)]
    return "\n".join(["## What happens inside, at QPS 1.0\n", _table(head, rows)])


def _others(plain: Runs) -> str:
    keys = sorted({(workload, qps) for workload, qps, _ in plain if workload != "code-writer"})
    rows = [
        [
            f"{workload}, QPS {qps:g}",
            *(_cell(plain.get((workload, qps, name))) for name in COMPARED),
            _ratio(plain.get((workload, qps, "default")), plain.get((workload, qps, "stock+host"))),
        ]
        for workload, qps in keys
    ]
    head = ["workload", *(f"`{name}`" for name in COMPARED), "`default` / `stock+host`"]
    return "\n".join(["## Other workloads\n", _table(head, rows)]) if rows else ""


def _kinds(plain: Runs) -> str:
    """What each class of traffic in a mixture gets."""
    mixed = {name: run for name in COMPARED if (run := plain.get(("mixed", QPS[-1], name))) is not None}
    if "stock+host" not in mixed or "default" not in mixed:
        return ""
    rows = []
    for kind, base in mixed["stock+host"]["kinds"].items():
        ours = mixed["default"]["kinds"][kind]
        latencies = (f"{run['kinds'][kind]['app_latency_s']['mean']:.0f}" for run in mixed.values())
        pairs = [(run["app_latency_s"]["mean"], run["ttft_s"]["p95"]) for run in (ours, base)]
        ratio = " / ".join(f"{mine / its:.2f}" for mine, its in zip(*pairs, strict=True))
        rows.append([kind, str(base["applications"]), *latencies, ratio])
    head = ["kind", "applications", *(f"`{name}`, mean s" for name in mixed), "mean / P95 of TTFT, to `stock+host`"]
    words = "The workload `mixed` by kind of traffic: what each kind gains or pays.\n"
    return "\n".join([words, _table(head, rows)])


def _shielding(plain: Runs) -> str:
    """Critical agents in a flood."""
    flooded = {name: run for name in COMPARED if (run := plain.get(("flood", QPS[-1], name))) is not None}
    if not flooded:
        return ""
    rows = [
        [
            f"`{name}`",
            f"{run['kinds']['critical']['app_latency_s']['mean']:.0f}",
            f"{run['critical_call_latency_s']['p95']:.1f}",
            f"{run['critical_inversions']}",
            f"{run['makespan_s']:.0f}",
        ]
        for name, run in flooded.items()
    ]
    words = (
        "Critical agents among three times as many long background calls (`flood`). An inversion is a "
        "critical call that was passed over or preempted for one that is not.\n"
    )
    head = ["", "critical agents, mean s", "their calls, P95 s", "critical inversions", "all work done, s"]
    return "\n".join(["## Shielding\n", words, _table(head, rows)])


def _robustness(runs: list[Metrics]) -> str:
    varied = {
        (run["variant"], run["policy"]): run for run in runs if run["variant"] != "plain" and run["qps"] == QPS[-1]
    }
    variants = sorted({variant for variant, _ in varied})
    rows = [
        [
            variant,
            *(_cell(varied.get((variant, name))) for name in VARIED),
            _ratio(varied.get((variant, "default")), varied.get((variant, "stock+host"))),
        ]
        for variant in variants
    ]
    head = ["variation", *(f"`{name}`" for name in VARIED), "`default` / `stock+host`"]
    return "\n".join(["## Code-writer at QPS 1.0, varied\n", _table(head, rows)]) if rows else ""


def _after_tools(runs: list[Metrics]) -> str:
    """First tokens after a tool where the device is not overrun."""
    found = {
        (run["variant"], run["policy"]): run["ttft_after_tool_s"]
        for run in runs
        if run["workload"] == "code-writer" and run["qps"] == QPS[0]
    }
    variants = sorted({variant for variant, name in found if name == "default"})
    rows = [
        [
            variant,
            *(
                f"{ttft['p50']:.2f} / {ttft['p95']:.2f}" if (ttft := found.get((variant, name))) is not None else "-"
                for name in TTFT
            ),
        ]
        for variant in variants
    ]
    words = "Code-writer at QPS 0.05: first token of the call after a tool, median / 95th percentile in seconds.\n"
    head = ["variation", *(f"`{name}`" for name in TTFT)]
    return "\n".join(["## After a tool\n", words, _table(head, rows)]) if rows else ""


def _published(plain: Runs) -> str:
    rows = [
        [
            f"{qps:g}",
            _published_ratio(qps),
            *(
                _ratio(plain.get(("code-writer", qps, name)), plain.get(("code-writer", qps, "stock")))
                for name in COMPARED[1:]
            ),
        ]
        for qps in QPS
    ]
    paper = ", ".join(f"{100 * share:.1f} % against {name}" for name, share in PAPER_REDUCTION.items())
    return "\n".join(
        [
            "## Beside what has been published\n",
            "Share of stock. The published system has the same host memory.\n",
            _table(["QPS", "published combined / base", *(f"`{name}` / `stock`" for name in COMPARED[1:])], rows),
            f"The paper itself reports, in another set-up (20 applications, 1 QPS), a mean latency lower by {paper}.\n",
        ]
    )
