"""One simulated run: a workload, a device and a policy."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from tokencake_sim.clients.applications import Applications
from tokencake_sim.device.clock import Clock, virtual_time
from tokencake_sim.device.worker import Links
from tokencake_sim.engine.build import EngineLimits, build_scheduler, quiet_vllm
from tokencake_sim.errors import NeverFitsError, WorkloadError
from tokencake_sim.measure.metrics import report, timeline
from tokencake_sim.workload.model import App, Node, Workload
from tokencake_sim.workload.tokens import texts_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake_sim.device.profiles import Profile
    from tokencake_sim.policies import Policy

Estimates = Literal["exact", "noisy", "fixed", "none"]
ESTIMATES: Final[tuple[Estimates, ...]] = get_args(Estimates)

ESTIMATE_SIGMA: Final = 0.5
"""Sigma of the lognormal error of a noisy estimate."""
FIXED_TOKENS: Final = 1_024
"""The length that a client expects of every answer, where it expects the same of all."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Variations of a run. None leaves a value as the workload or the profile has it."""

    seed: int = 0
    tool_noise: float = 0.0
    """Sigma of the lognormal factor between nominal and true tool time."""
    estimates: Estimates | None = None
    """Of tool times and answers. None: tool times as the workload has them, answers exact."""
    kv_blocks: int | None = None
    host_bytes: float | None = None
    link_bytes_per_s: float | None = None
    is_async: bool | None = None
    sample_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Result:
    """The metrics of a run, what its plots need, and its trace: begin, tokens and calls of every step."""

    metrics: dict[str, Any]
    timeline: dict[str, Any]
    trace: tuple[tuple[float, int, int], ...]


def simulate(workload: Workload, profile: Profile, policy: Policy, options: RunOptions | None = None) -> Result:
    """Run `workload` to its end.

    Raises:
        WorkloadError: a prompt is longer than the model, or a call can never fit.
        DeadlockError: nothing runs, something waits and no event is pending.
    """
    quiet_vllm()
    options = options or RunOptions()
    limits = _limits(profile, policy, options)
    check_fits(workload, limits)
    workload = _with_noise(workload, options)
    host_bytes = profile.host_bytes if options.host_bytes is None else options.host_bytes
    links = Links.of(options.link_bytes_per_s or profile.link_bytes_per_s)
    scheduler_class = policy.scheduler(limits.async_scheduling)
    connector = None if policy.host is None else policy.host.connector(int(host_bytes // profile.block_bytes))
    if connector is not None:
        import_module(connector.module)  # before the clock is lent, or the connector would keep the real one

    from tokencake_sim.engine.loop import EngineLoop  # noqa: PLC0415
    from tokencake_sim.measure.kv_occupancy import KVOccupancy  # noqa: PLC0415  these import vLLM, which must be quiet by then
    from tokencake_sim.measure.step_recorder import StepRecorder  # noqa: PLC0415

    clock = Clock()
    with virtual_time(clock):
        scheduler = build_scheduler(
            scheduler_class,
            limits,
            policy=policy.vllm_policy,
            connector=connector,
            additional_config=policy.additional_config(),
        )
        occupancy = KVOccupancy(scheduler, clock)
        recorder = StepRecorder(
            clock,
            profile.cost,
            occupancy,
            block_tokens=limits.block_tokens,
            sample_s=options.sample_s,
            is_recompute_free=policy.is_recompute_free,
        )
        engine = EngineLoop(
            scheduler,
            policy.make_worker(links, profile.block_bytes),
            clock,
            recorder,
            vocabulary=limits.model.vocabulary,
            priority_of=policy.priority_of,
        )
        applications = Applications(
            workload, clock, engine, limits.model.vocabulary, partial(_expected_output, options)
        )
        recorder.stalled = applications.stalled.values
        engine.run(lambda: applications.is_over, applications.take_answer)
        occupancy.account()
        metrics = report(
            applications=applications,
            recorder=recorder,
            occupancy=occupancy,
            links=links,
            decisions=_decisions(scheduler),
            makespan_s=clock.now_s,
        )
    head = {"workload": workload.name, "profile": profile.name, "policy": policy.name, "seed": options.seed}
    return Result({**head, **metrics}, timeline(applications, occupancy), tuple(recorder.trace))


def _limits(profile: Profile, policy: Policy, options: RunOptions) -> EngineLimits:
    return EngineLimits(
        model=profile.model,
        kv_blocks=options.kv_blocks or policy.kv_blocks or profile.kv_blocks,
        block_tokens=profile.block_tokens,
        max_model_len=profile.max_model_len,
        max_batched_tokens=profile.max_batched_tokens,
        max_seqs=profile.max_seqs,
        async_scheduling=profile.async_scheduling if options.is_async is None else options.is_async,
    )


def check_fits(workload: Workload, limits: EngineLimits) -> None:
    """Check every prompt against the model and the device.

    Raises:
        WorkloadError: a prompt is empty, or with its answer longer than the model.
        NeverFitsError: a call needs more blocks than there are.
    """
    usable_blocks = limits.kv_blocks - 1
    for app in workload.apps:
        texts = texts_of(app)
        for node in app.nodes:
            if node.is_local:
                continue
            where = f"application {app.id}, node {node.id}"
            prompt_tokens = texts[node.id].prompt_tokens
            tokens = prompt_tokens + node.output_tokens
            blocks = math.ceil(tokens / limits.block_tokens)
            if not prompt_tokens:
                raise WorkloadError(workload.source, where, "has an empty prompt; give it new_tokens or a predecessor")
            if tokens > limits.max_model_len:
                raise WorkloadError(
                    workload.source,
                    where,
                    f"has a prompt of {prompt_tokens} tokens and an answer of {node.output_tokens}; the model takes "
                    f"{limits.max_model_len} together",
                )
            if blocks > usable_blocks:
                raise NeverFitsError(
                    workload.source,
                    where,
                    f"needs {blocks} KV blocks and can never fit into the {usable_blocks} there are; raise --kv-blocks",
                )


def _with_noise(workload: Workload, options: RunOptions) -> Workload:
    """The workload with its estimates and its true tool times as `options` want them."""
    return replace(workload, apps=tuple(_app_with_noise(app, options) for app in workload.apps))


def _app_with_noise(app: App, options: RunOptions) -> App:
    draw = random.Random(f"{options.seed}/{app.id}/tools")  # noqa: S311  repeatable, not secret
    return replace(app, nodes=tuple(_node_with_noise(node, options, draw) for node in app.nodes))


def _node_with_noise(node: Node, options: RunOptions, draw: random.Random) -> Node:
    # Both are drawn for every node, so that one option does not change what the other draws.
    error, noise = draw.lognormvariate(0.0, ESTIMATE_SIGMA), draw.lognormvariate(0.0, options.tool_noise)
    if node.tool is None:
        return node
    estimate_s = {
        None: node.tool.estimate_s,
        "fixed": node.tool.estimate_s,
        "exact": node.tool.duration_s,
        "noisy": node.tool.duration_s * error,
        "none": None,
    }[options.estimates]
    tool = replace(node.tool, duration_s=node.tool.duration_s * noise, estimate_s=estimate_s)
    return replace(node, tool=tool)


def _expected_output(options: RunOptions, app: App, node: Node) -> int | None:
    match options.estimates:
        case "none":
            return None
        case "fixed":
            return FIXED_TOKENS
        case "noisy":
            draw = random.Random(f"{options.seed}/{app.id}/{node.id}/output")  # noqa: S311  repeatable, not secret
            return max(1, round(node.output_tokens * draw.lognormvariate(0.0, ESTIMATE_SIGMA)))
        case _:
            return node.output_tokens


def _decisions(scheduler: Scheduler) -> dict[str, int]:
    """Counters of the connector and the plug-in: `kind/outcome` -> number."""
    counts: dict[str, int] = dict(getattr(scheduler.connector, "counts", {}))
    registry = getattr(scheduler, "registry", None)
    if registry is not None:
        counts |= {"/".join(key) if isinstance(key, tuple) else str(key): n for key, n in registry.counts.items()}
    return dict(sorted(counts.items()))
