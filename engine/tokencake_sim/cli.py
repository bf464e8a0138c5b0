"""`tokencake sim`: the simulator's command line.

Exit codes: 0 the run is over, 1 the run deadlocked, 2 the input cannot be run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokencake.settings import SettingsError
from tokencake_sim.capture import calibrate, from_run
from tokencake_sim.device.profiles import PROFILES
from tokencake_sim.engine.build import quiet_vllm
from tokencake_sim.errors import DeadlockError, SimulationError, WorkloadError
from tokencake_sim.policies import POLICIES, Policy, policy_named
from tokencake_sim.simulate import ESTIMATES, RunOptions, simulate
from tokencake_sim.workload.arrivals import ARRIVALS
from tokencake_sim.workload.generators import GENERATORS, generate
from tokencake_sim.workload.load import load_workload, to_json
from tokencake_sim.workload.model import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

_GIB: Final = float(2**30)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(section, dict) for section in value.values()):
        raise argparse.ArgumentTypeError(f"{text} is not an object of sections")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokencake sim",
        description="Run an agent workload through the real vLLM scheduler in virtual time.",
    )
    parser.epilog = (
        "`tokencake sim record SOURCE OUT.json` turns a real run into a workload; "
        "`tokencake sim calibrate STEPS` fits a profile to the measured steps of a running engine."
    )
    add = parser.add_argument
    add("--workload", default="code-writer", help="a generator (see --list) or a JSON file")
    add("--qps", type=_positive, default=1.0, help="applications per second (generators only)")
    add("--apps", type=_count, default=24, help="number of applications (generators only)")
    add("--arrivals", choices=ARRIVALS, default="equal", help="how they arrive (generators only)")
    add("--profile", choices=PROFILES, default="a800-qwen2.5-14b", help="the modelled device")
    add("--policy", default="stock", help="see --list")
    add(
        "--settings",
        type=_object,
        default={},
        metavar="JSON",
        help='over a policy\'s own: {"space": {...}, "time": {...}}',
    )
    add("--seed", type=int, default=1)
    add("--tool-noise", type=_not_negative, default=0.0, metavar="SIGMA", help="lognormal error of the tool times")
    add(
        "--estimates",
        choices=ESTIMATES,
        help="what is said beforehand of tool times and answers; fixed: 1,024 tokens of all; default: exact answers",
    )
    add("--host-gib", type=_not_negative, metavar="G", help="host memory for KV; default: the profile's")
    add("--link-gbps", type=_positive, metavar="B", help="GB/s between host and device, each way")
    add("--kv-blocks", type=_count, metavar="N", help="KV blocks on the device")
    add("--json", type=Path, metavar="FILE", help="write the metrics there; - for standard output")
    add("--timeline", type=Path, metavar="FILE", help="write every call and the state of the KV cache over time there")
    add("--save-workload", type=Path, metavar="FILE", help="write the workload there as JSON, and run nothing")
    add("--list", action="store_true", help="list workloads, profiles and policies")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv`, the words after `tokencake sim`."""
    try:
        match argv:
            case ["calibrate", *rest]:
                return calibrate.main(rest)
            case ["record", *rest]:
                return from_run.main(rest)
            case _:
                return _main(_parser().parse_args(argv))
    except DeadlockError as error:
        print(f"tokencake sim: the run deadlocked: {error}", file=sys.stderr)
        return 1
    except (SimulationError, SettingsError, OSError) as error:
        print(f"tokencake sim: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(_listing())
        return 0
    quiet_vllm()
    policy = policy_named(arguments.policy).set_to(arguments.settings)
    workload = _workload(arguments)
    if arguments.save_workload is None:
        return _run(arguments, workload, policy)
    _write(arguments.save_workload, to_json(workload))
    return 0


def _workload(arguments: argparse.Namespace) -> Workload:
    name: str = arguments.workload
    if name in GENERATORS:
        return generate(name, count=arguments.apps, qps=arguments.qps, seed=arguments.seed, arrivals=arguments.arrivals)
    path = Path(name)
    if not path.exists():
        known = ", ".join(GENERATORS)
        raise WorkloadError(name, "the workload", f"is neither a file nor one of {known}")
    return load_workload(path)


def _run(arguments: argparse.Namespace, workload: Workload, policy: Policy) -> int:
    options = RunOptions(
        seed=arguments.seed,
        tool_noise=arguments.tool_noise,
        estimates=arguments.estimates,
        kv_blocks=arguments.kv_blocks,
        host_bytes=None if arguments.host_gib is None else arguments.host_gib * _GIB,
        link_bytes_per_s=None if arguments.link_gbps is None else arguments.link_gbps * 1e9,
    )
    began_s = time.perf_counter()
    result = simulate(workload, PROFILES[arguments.profile], policy, options)
    wall_s = time.perf_counter() - began_s
    metrics = {
        **result.metrics,
        "arguments": {key: str(value) for key, value in vars(arguments).items() if value is not None},
        "wall_s": wall_s,
        "simulated_s_per_s": result.metrics["makespan_s"] / wall_s,
    }
    if arguments.timeline is not None:
        _write(arguments.timeline, result.timeline)
    if arguments.json is not None and str(arguments.json) == "-":
        print(json.dumps(metrics, indent=1))
        return 0
    if arguments.json is not None:
        _write(arguments.json, metrics)
    print(_summary(metrics))
    return 0


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _summary(metrics: dict[str, Any]) -> str:
    def line(label: str, key: str) -> str:
        values = metrics[key]
        shown = "  ".join(
            f"{name} {'-' if values[name] is None else format(values[name], '.2f'):>9}"
            for name in ("mean", "p95", "max")
        )
        return f"  {label:<22}{shown}"

    hits, links = metrics["hit_tokens"], metrics["transfers"]
    to_host, to_device = links["to_host"]["bytes"] / 1e9, links["to_device"]["bytes"] / 1e9
    head = f"{metrics['workload']}, {metrics['applications']} applications, {metrics['calls']} calls"
    again = metrics["recomputed_tokens"]
    held, useful = metrics["kv_occupancy"], metrics["kv_effective_utilisation"]
    lines = [
        f"{head}, {metrics['policy']} on {metrics['profile']}",
        f"  makespan              {metrics['makespan_s']:.1f} s",
        line("application latency s", "app_latency_s"),
        line("time to first token s", "ttft_s"),
        line("  after a tool", "ttft_after_tool_s"),
        line("queue s", "queue_s"),
        f"  prefill tokens        {metrics['prefill_tokens']:,} computed, {again:,} more after preemption",
        f"  prefix tokens hit     {hits['device']:,} on the device, {hits['host']:,} from the host",
        f"  preemptions           {metrics['preemptions']}, critical inversions {metrics['critical_inversions']}",
        f"  KV blocks             {held:.1%} held, {useful:.1%} held or hit later",
        f"  copied                {to_host:.1f} GB to the host, {to_device:.1f} GB back",
        f"  simulated             {metrics['simulated_s_per_s']:.0f} s per second ({metrics['wall_s']:.1f} s)",
    ]
    return "\n".join(lines)


def _listing() -> str:
    parts = [
        ("workloads", GENERATORS.items()),
        ("profiles", [(name, profile.source) for name, profile in PROFILES.items()]),
        ("policies", [(name, policy.summary) for name, policy in POLICIES.items()]),
    ]
    return "\n".join(
        line for title, entries in parts for line in (title, *(f"  {name:<20}{text}" for name, text in entries))
    )
