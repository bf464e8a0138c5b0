"""The Space Scheduler over whole workloads, with a host tier, in the simulator."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.harness.small_device import SMALL
from tokencake_sim import App, Node, Prefix, RunOptions, Tool, Workload, policy_named, simulate


def run(workload: Workload, policy: str, *, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    chosen = policy_named(policy)
    if settings is not None:
        chosen = chosen.set_to({"space": settings})
    return simulate(workload, SMALL, chosen, RunOptions(**options))


@pytest.fixture(scope="module")
def crowd() -> Workload:
    """Applications of three agents each, more than fit at a time."""
    apps = []
    for index in range(8):
        nodes = (
            Node("plan", "planner", 300, 40, prefix=Prefix("rules", 64), tool=Tool("search", 1.0, 50, 1.0)),
            Node("left", "coder", 20, 60, ("plan",), tool=Tool("test", 2.0, 60, 2.0), join="merge", critical=True),
            Node("right", "coder", 20, 60, ("plan",), tool=Tool("test", 0.1, 60, 0.1), join="merge", critical=False),
            Node("merge", "reviewer", 10, 50, ("left", "right")),
        )
        apps.append(App(f"app-{index}", "crowd", index * 0.2, nodes))
    return Workload("crowd", tuple(apps), "the test")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["space", "space+host", "paper-space+host", "ours"])
def test_the_plug_in_makes_no_mistake_and_leaves_nothing_admissible_idle(
    crowd: Workload, policy: str, is_async: bool
) -> None:
    metrics = run(crowd, policy, is_async=is_async).metrics

    assert metrics["calls"] == 8 * 4
    assert metrics["idle_while_admissible_s"] == 0.0
    assert not [name for name in metrics["decisions"] if name.startswith("errors")]


def test_applications_end_sooner_than_under_first_come_first_served() -> None:
    """Three turns each, one application at a time fits; first come first served runs all of them in parallel."""
    turns = tuple(
        Node(f"turn{n}", "agent", 300, 40, (f"turn{n - 1}",) if n else (), tool=Tool("t", 0.1, 20, 0.1))
        for n in range(3)
    )
    line = Workload("line", tuple(App(f"app-{n}", "line", n * 0.1, turns) for n in range(8)), "the test")
    stock, ours = (run(line, policy, kv_blocks=75).metrics for policy in ("stock+host", "space+host"))

    assert ours["app_latency_s"]["mean"] < 0.9 * stock["app_latency_s"]["mean"]
    assert ours["makespan_s"] < 1.05 * stock["makespan_s"]


def test_agents_that_somebody_waits_for_are_shielded_from_a_flood_of_long_calls() -> None:
    turns = tuple(
        Node(f"turn{n}", "agent", 80, 20, (f"turn{n - 1}",) if n else (), tool=Tool("t", 0.5, 20, 0.5), critical=True)
        for n in range(4)
    )
    long = (Node("long", "batch", 400, 200, critical=False),)
    apps = [App(f"batch-{n}", "batch", n * 0.1, long) for n in range(16)]
    apps += [App(f"critical-{n}", "critical", 0.55 + n * 0.3, turns) for n in range(4)]
    flood = Workload("flood", tuple(sorted(apps, key=lambda app: app.arrival_s)), "the test")
    stock, ours = (run(flood, policy).metrics for policy in ("stock+host", "space+host"))
    means = [metrics["kinds"]["critical"]["app_latency_s"]["mean"] for metrics in (stock, ours)]

    assert stock["critical_inversions"] >= 10
    assert ours["critical_inversions"] <= 0.1 * stock["critical_inversions"]
    assert means[1] <= 0.7 * means[0]
    assert ours["makespan_s"] <= stock["makespan_s"] / 0.97


def test_switched_off_the_whole_run_is_that_of_stock(crowd: Workload) -> None:
    assert run(crowd, "space+host", settings={"enabled": False}).trace == run(crowd, "stock+host").trace


@pytest.mark.parametrize("policy", ["space+host", "paper-space+host"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_two_loads_that_hold_each_others_memory_do_not_stop_the_engine(policy: str, is_async: bool) -> None:
    """Of 20 blocks one call needs 17 and one 11, half of each comes from the host at the same time."""
    apps = [
        App(name, name, 0.0, (first, Node("second", name, 28, 8, ("first",))))
        for name, first in (
            ("a", Node("first", "a", 118, 10, tool=Tool("t", 30.0, 100, 30.0))),
            ("b", Node("first", "b", 118, 10, tool=Tool("t", 30.0, 4, 30.0))),
        )
    ]
    scribble = App("c", "c", 10.0, (Node("only", "c", 300, 8),))
    metrics = run(Workload("deadlock", (*apps, scribble), "the test"), policy, kv_blocks=21, is_async=is_async).metrics

    assert metrics["applications"] == 3
    assert metrics["hit_tokens"]["host"] > 0


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_with_swaps_whenever_possible_all_is_done_and_nothing_idles(crowd: Workload, is_async: bool) -> None:
    eager = {"swap_oldest": 8, "swap_from": 1, "swap_share": 0.0, "swap_patience_tokens": 0}
    metrics = run(crowd, "ours", settings=eager, is_async=is_async, kv_blocks=70).metrics

    assert metrics["decisions"]["space_swaps"] > 0
    assert metrics["calls"] == 8 * 4
    assert metrics["idle_while_admissible_s"] == 0.0
    assert not [name for name in metrics["decisions"] if name.startswith("errors")]
