"""The simulator: vLLM's own scheduler, with any policy on top, in virtual time on a modelled device."""

from tokencake_sim.device.profiles import PROFILES, Profile
from tokencake_sim.errors import DeadlockError, NeverFitsError, SimulationError, UnknownPolicyError, WorkloadError
from tokencake_sim.policies import POLICIES, policy_named
from tokencake_sim.simulate import Result, RunOptions, simulate
from tokencake_sim.workload.generators import GENERATORS, generate
from tokencake_sim.workload.load import load_workload
from tokencake_sim.workload.model import App, Node, Prefix, Tool, Workload

__all__ = [
    "GENERATORS",
    "POLICIES",
    "PROFILES",
    "App",
    "DeadlockError",
    "NeverFitsError",
    "Node",
    "Prefix",
    "Profile",
    "Result",
    "RunOptions",
    "SimulationError",
    "Tool",
    "UnknownPolicyError",
    "Workload",
    "WorkloadError",
    "generate",
    "load_workload",
    "policy_named",
    "simulate",
]
