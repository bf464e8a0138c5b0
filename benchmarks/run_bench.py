"""`make bench`: the sweep, its results as JSON and pictures, and the page that reads them (`docs/bench.md`).

python -m benchmarks.run_bench [--jobs 2] [--keep] [--only code-writer]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report.page import BOUNDS, COMPARED, PARTS, TTFT, write_page
from benchmarks.report.pictures import OVER_TIME
from benchmarks.report.published import QPS
from tokencake_sim import PROFILES, RunOptions, generate, policy_named, simulate
from tokencake_sim.simulate import ESTIMATES, Estimates
from tokencake_sim.workload.arrivals import Arrivals

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "bench.md"
PROFILE = "a800-qwen2.5-14b"
GIB = float(2**30)


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the sweep."""

    workload: str
    qps: float
    policy: str
    apps: int = 24
    variant: str = "plain"
    arrivals: Arrivals = "equal"
    seed: int = 1
    tool_noise: float = 0.0
    host_gib: float | None = None
    link_gbps: float | None = None
    estimates: Estimates | None = None

    @property
    def name(self) -> str:
        """Name of the result file, without its ending."""
        return f"{self.workload}_{self.qps:g}_{self.policy}_{self.variant}".replace("+", "-with-")

    @property
    def is_pictured(self) -> bool:
        """Whether the page shows this run over time."""
        is_shown = (self.workload, self.qps, self.variant) == ("code-writer", max(QPS), "plain")
        return is_shown and self.policy in OVER_TIME


def sweep() -> list[Case]:
    """All runs, the published ones first."""
    cases = [Case("code-writer", qps, policy) for qps in QPS for policy in COMPARED]
    cases += [Case("code-writer", qps, policy) for qps in (0.2, 1.0) for policy in PARTS]
    cases += [Case("code-writer", min(QPS), "time")]
    cases += [Case("code-writer", 1.0, bound) for bound in BOUNDS]
    cases += [Case("deep-research", qps, policy) for qps in (0.2, 1.0) for policy in COMPARED]
    sizes = (("mixed", 40), ("flood", 72))
    cases += [Case(name, 1.0, policy, apps=apps) for name, apps in sizes for policy in COMPARED]
    cases += [Case(workload, 1.0, policy) for workload in ("react", "supervisor") for policy in COMPARED]
    varied = [
        *(Case("code-writer", 1.0, "", variant=f"poisson-{seed}", arrivals="poisson", seed=seed) for seed in (1, 2, 3)),
        Case("code-writer", 1.0, "", variant="tool-noise-0.5", tool_noise=0.5),
        Case("code-writer", 1.0, "", variant="host-20-gib", host_gib=20.0),
        Case("code-writer", 1.0, "", variant="link-4-gbps", link_gbps=4.0),
    ]
    cases += [replace(case, policy=policy) for case in varied for policy in ("stock+host", "default")]
    cases += [replace(case, policy="time") for case in varied if case.variant in ("host-20-gib", "tool-noise-0.5")]
    # stock and a store on the host know no estimates: these vary the default alone.
    cases += [
        Case("code-writer", 1.0, "default", variant=f"estimates-{kind}", estimates=kind) for kind in ESTIMATES[1:]
    ]
    slow_link = Case("code-writer", min(QPS), "", variant="link-4-gbps", link_gbps=4.0)
    return cases + [replace(slow_link, policy=policy) for policy in TTFT]


def run(case: Case) -> dict[str, Any]:
    """Metrics and timeline of one run."""
    workload = generate(case.workload, count=case.apps, qps=case.qps, seed=case.seed, arrivals=case.arrivals)
    options = RunOptions(
        seed=case.seed,
        tool_noise=case.tool_noise,
        estimates=case.estimates,
        host_bytes=None if case.host_gib is None else case.host_gib * GIB,
        link_bytes_per_s=None if case.link_gbps is None else case.link_gbps * 1e9,
    )
    began_s = time.perf_counter()
    result = simulate(workload, PROFILES[PROFILE], policy_named(case.policy), options)
    wall_s = time.perf_counter() - began_s
    metrics = {**result.metrics, "qps": case.qps, "variant": case.variant, "wall_s": round(wall_s, 1)}
    return {"metrics": metrics, "timeline": result.timeline if case.is_pictured else None}


def _store(case: Case, found: dict[str, Any]) -> None:
    (RESULTS / f"{case.name}.json").write_text(json.dumps(found["metrics"], indent=1) + "\n", encoding="utf-8")
    if found["timeline"] is not None:
        (RESULTS / f"{case.name}.timeline.json").write_text(json.dumps(found["timeline"]) + "\n", encoding="utf-8")
    metrics = found["metrics"]
    latency = metrics["app_latency_s"]
    print(
        f"{case.name:<44} {metrics['makespan_s']:7.0f} {latency['mean']:7.0f} {latency['p95']:7.0f}"
        f"   {metrics['wall_s']:5.0f} s",
        flush=True,
    )


def main() -> int:
    """Run what is asked for and write the page over all results there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--keep", action="store_true", help="do not repeat runs that have a result")
    parser.add_argument("--only", help="cases whose name contains this")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    cases = [
        case
        for case in sweep()
        if (arguments.only or "") in case.name and not (arguments.keep and (RESULTS / f"{case.name}.json").exists())
    ]
    print(f"{'run':<44} {'E2E s':>7} {'mean s':>7} {'p95 s':>7}   {'took':>7}", flush=True)
    if arguments.jobs == 1:
        for case in cases:
            _store(case, run(case))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=spawn) as pool:
            for case, found in zip(cases, pool.map(run, cases), strict=True):
                _store(case, found)
    write_page(RESULTS, PAGE)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
