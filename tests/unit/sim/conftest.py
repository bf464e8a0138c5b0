import warnings

import pytest

from tests.harness.small_device import SMALL
from tokencake_sim import App, Node, Prefix, RunOptions, Tool, Workload, policy_named, simulate
from tokencake_sim.engine.build import quiet_vllm

quiet_vllm()
with warnings.catch_warnings():
    # Importing torch and vLLM uses what they themselves have deprecated.
    warnings.simplefilter("ignore")
    import vllm.v1.core.sched.async_scheduler
    import vllm.v1.structured_output  # noqa: F401  for its warnings only


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def crowd():
    """Applications of three agents each, more than fit at a time."""
    apps = []
    for index in range(4):
        nodes = (
            Node("plan", "planner", 300, 40, prefix=Prefix("rules", 64), tool=Tool("search", 1.0, 50, 1.0)),
            Node("left", "coder", 20, 60, ("plan",), tool=Tool("test", 2.0, 60, 2.0), join="merge", critical=True),
            Node("right", "coder", 20, 60, ("plan",), tool=Tool("test", 0.1, 60, 0.1), join="merge", critical=False),
            Node("merge", "reviewer", 10, 50, ("left", "right")),
        )
        apps.append(App(f"app-{index}", "crowd", index * 0.2, nodes))
    return Workload("crowd", tuple(apps), "the test")


@pytest.fixture(scope="session")
def run(small):
    def run_with(workload, policy="stock", **options):
        return simulate(workload, small, policy_named(policy), RunOptions(**options))

    return run_with
