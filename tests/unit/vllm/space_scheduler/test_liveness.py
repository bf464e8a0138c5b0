"""Nobody waits for ever, whatever is said and whoever lies: docs/space-scheduler.md on the real scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.request import Request, RequestStatus

from tests.harness.kv_worker import SchedulerHarness
from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import StepLoop, as_json, hint
from tests.harness.tenancy import prefix_of
from tokencake import protocol

STEP_S = 0.1


class Clocked(StepLoop):
    """StepLoop of `STEP_S` on a clock of their own, and when each call had its first token."""

    def __init__(self, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(scheduler)
        self.now = 1_000.0
        self.began_s: dict[str, float] = {}
        self.ended_s: dict[str, float] = {}
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def step(self, **how: bool) -> Any:
        self.now += STEP_S
        output = super().step(**how)
        for name in output.num_scheduled_tokens:
            self.began_s.setdefault(name, self.now)
        return output

    def complete(self) -> None:
        super().complete()
        for name in self.ends:
            self.ended_s.setdefault(name, self.now)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clocked]:
    def make(num_blocks: int = 24, *, is_async: bool = False, **space: Any) -> Clocked:
        scheduler = build_scheduler(is_async=is_async, num_blocks=num_blocks, space={"enabled": True, **space})
        return Clocked(scheduler, monkeypatch)

    return make


# --- absurd hints and events ------------------------------------------------------------------------

IDS = st.sampled_from(["a", "b", "c", "d"])
TENANTS = st.sampled_from(["", "t1", "t2"])
NODES = st.sampled_from(["n", "m", "end"])
CALLS = st.sampled_from(["c0", "c1", "c2", "c3"])
EVENTS = st.one_of(
    st.builds(protocol.AppEnd, IDS),
    st.builds(protocol.SessionEnd, IDS.map(lambda name: f"{name}/session")),
    st.builds(protocol.ToolStart, CALLS, st.just("t"), st.just("tool"), st.sampled_from([None, 0.0, 2e6])),
    st.builds(protocol.ToolEnd, CALLS, st.just("t"), duration_s=st.sampled_from([None, 0.0, 2e6])),
    st.builds(protocol.StallStart, IDS.map(lambda name: f"{name}/session"), st.just("human")),
    st.builds(
        protocol.Graph,
        st.sampled_from(["g", "h"]),
        st.just({"n": {}, "m": {}}),
        st.lists(st.tuples(NODES, NODES), max_size=6).map(tuple),
    ),
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "call": CALLS,
        "graph": st.sampled_from(["g", "h", "unknown"]),
        "node": NODES,
        "agent": st.sampled_from(["x", "y"]),
        "join": st.sampled_from(["j", "k"]),
        "parent_call": CALLS,
        "critical": st.booleans(),
        "importance": st.sampled_from([0.0, 10.0]),
        "remaining": st.sampled_from([0, 1_000_000]),
        "expected_output_tokens": st.sampled_from([0, 1_000_000]),
        "app_started_ago_s": st.just(2e6),
        "reuse": st.sampled_from(["final", "extends"]),
    },
)
DEED = st.one_of(
    st.tuples(st.just("add"), IDS, TENANTS, FIELDS, st.integers(1, 200), st.integers(1, 60)),
    st.tuples(st.just("tell"), EVENTS, TENANTS),
    st.tuples(st.just("step"), st.integers(1, 9)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["ours", "paper"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(deeds=st.lists(DEED, min_size=3, max_size=30))
def test_every_call_ends_whatever_hints_and_events_say(policy: str, is_async: bool, deeds: list[Any]) -> None:
    space = {"enabled": True, "policy": policy, "tenant_mark": "::"}
    steps = StepLoop(build_scheduler(is_async=is_async, num_blocks=24, space=space))
    wanted: dict[str, int] = {}
    for number, (kind, *what) in enumerate(deeds):
        match kind:
            case "add":
                app, tenant, fields, tokens, answer = what
                wanted[f"r{number}"] = answer
                said = hint(app, tenant=tenant, **fields)
                steps.add(make_request(f"r{number}", [number % 3] * tokens, said, max_tokens=answer))
            case "tell":
                event, tenant = what
                prefix = prefix_of(tenant) if tenant else ""
                steps.scheduler.tokencake_events([as_json(protocol.to_wire(event))], 0.0, prefix)
            case "step":
                for _ in range(what[0]):
                    steps.step()
            case "abort" if wanted:
                name = list(wanted)[what[0] % len(wanted)]
                steps.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                wanted.pop(name)
    steps.run()

    assert all(steps.received[name] == answer for name, answer in wanted.items())
    steps.check_empty()


# --- the stated bound -------------------------------------------------------------------------------

SHORT_WAITS = {
    "head_start_s": 4.0,
    "short_s": 0.2,
    "sibling_s": 2.0,
    "importance_s": 0.2,
    "critical_s": 2.0,
    "pass_s": 3.0,
}
BOUND_S = 4.0 + 2.0 + 10 * 0.2 + 2.0


@pytest.mark.parametrize(
    "flood",
    [
        {},
        {"critical": True, "importance": 10.0},
        {"remaining": 0, "expected_output_tokens": 1},
        {"critical": True, "importance": 10.0, "remaining": 1_000_000, "app_started_ago_s": 2e6},
    ],
    ids=["plain", "pressing", "short", "everything"],
)
@pytest.mark.parametrize("is_shared", [False, True], ids=["apart", "siblings"])
def test_nobody_who_came_after_the_bound_begins_before_a_call_that_waits(
    clocked: Any, flood: dict[str, Any], is_shared: bool
) -> None:
    """A call that needs most of the memory, in an endless stream of small ones that would always fit."""
    steps = clocked(num_blocks=24, **SHORT_WAITS)
    came_s: dict[str, float] = {}

    def add(name: str, app: str, tokens: list[int], answer: int, **fields: Any) -> None:
        came_s[name] = steps.now
        steps.add(make_request(name, tokens, hint(app, **fields), max_tokens=answer))

    number = 0
    for turn in range(400):
        if turn % 3 == 0:
            number += 1
            tokens = [1] * 48 + ([] if is_shared else [number]) + [number] * 15
            add(f"small{number}", f"flood{number}", tokens, 15, **flood)
        if turn == 30:
            add("large", "patient", [9] * 290, 5, critical=False, importance=0.0)
        steps.step()
        if "large" in steps.ended_s:
            break
    assert "large" in steps.ended_s, "it starves"
    late = came_s["large"] + BOUND_S + SHORT_WAITS["pass_s"]
    bypassed = [name for name, at in steps.began_s.items() if came_s[name] > late and at < steps.began_s["large"]]
    assert bypassed == []


def test_the_later_turns_of_a_talk_have_not_waited_since_its_first(clocked: Any) -> None:
    steps = clocked()
    for _ in range(2):
        plain = make_request("talk", list(range(40)), hint("talk"), max_tokens=4)
        params, hasher = plain.sampling_params, plain._block_hasher
        steps.add(Request("talk", list(range(40)), params, None, block_hasher=hasher, resumable=True))
        for _ in range(8):
            steps.step()
        steps.now += 1_000.0

    assert steps.received["talk"] == 8
    assert steps.scheduler.tokencake_decisions(None, None, 10)["longest_wait_s"] <= STEP_S
    steps.scheduler.finish_requests("talk", RequestStatus.FINISHED_ABORTED)
    steps.check_empty()


# --- lies -------------------------------------------------------------------------------------------

LIES: dict[str, dict[str, Any]] = {
    "critical": {"critical": True},
    "important": {"importance": 10.0},
    "old": {"app_started_ago_s": 2e6},
    "nearly done": {"remaining": 0, "expected_output_tokens": 1},
    "far from done": {"remaining": 1_000_000},
    "all of it": {"critical": True, "importance": 10.0, "app_started_ago_s": 2e6, "remaining": 1_000_000, "depth": 99},
}


def _means(clocked: Any, lie: dict[str, Any], names: Callable[[int], str], *, has_tenants: bool) -> Any:
    """Mean seconds to the end of either side's calls; both want the same, a call each three steps."""
    steps = clocked(tenant_quantum_s=0.2, tenant_mark="::" if has_tenants else None)
    began = {}
    for number in range(30):
        for side, app, fields in (("liar", names(number), lie), ("honest", f"good{number}", {})):
            name = f"{side}{number}"
            tokens = [100 * number + (side == "liar")] * 100
            said = hint(app, tenant=side if has_tenants else "", **fields)
            steps.add(make_request(name, tokens, said, max_tokens=20))
            began[name] = steps.now
        for _ in range(3):
            steps.step()
    steps.run()
    took = {name: steps.ended_s[name] - at for name, at in began.items()}
    return {side: sum(took[f"{side}{n}"] for n in range(30)) / 30 for side in ("liar", "honest")}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_tenant_gains_nothing_by_a_lie_that_it_would_not_have_by_the_truth(clocked: Any, lie: str) -> None:
    def evil(number: int) -> str:
        return f"evil{number}"

    truth = _means(clocked, {}, evil, has_tenants=True)
    lying = _means(clocked, LIES[lie], evil, has_tenants=True)

    assert lying["honest"] <= 1.1 * truth["honest"]
    assert lying["liar"] >= 0.9 * truth["liar"]
    assert lying["liar"] >= 0.9 * lying["honest"]


def test_whoever_calls_himself_many_tenants_is_one_unless_the_proxy_says_so(clocked: Any) -> None:
    truth = _means(clocked, {}, lambda number: f"evil{number}", has_tenants=False)
    lying = _means(clocked, {}, lambda number: f"tenant{number}::x", has_tenants=False)

    assert lying == truth


# --- two loads that hold each other's memory --------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["ours", "paper"])
def test_loads_that_hold_what_the_other_needs_do_not_stop_the_engine(
    monkeypatch: pytest.MonkeyPatch, policy: str, is_async: bool
) -> None:
    """20 blocks; one call needs 16 and one 10, and the first 8 of either come from the host at the same time."""
    space = {"enabled": True, "policy": policy}
    engine = SchedulerHarness(monkeypatch, space, num_blocks=21, is_async=is_async, upload=False)
    for name in "ab":
        engine.answer([ord(name)] * 126, session=name, app=name, expects_tools={"build": 60.0}, reuse="extends")
        engine.wipe()
    large = engine.call([ord("a")] * 126 + [7] * 4 + [3] * 124, "a", 2, app="a")
    small = engine.call([ord("b")] * 126 + [7] * 4 + [4] * 28, "b", 2, app="b")
    engine.run(400)

    assert [engine.cached_tokens(name)[1] for name in (large, small)] == [128, 128]
    engine.check()
