"""The Space and the Time Scheduler on one block pool: whatever happens, the account adds up and everything ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.harness.kv_worker import PROMPT, MakeHarness, SchedulerHarness
from tests.harness.steps import as_json
from tests.unit.vllm.time_scheduler.test_traces import Trace, actions
from tokencake import protocol
from tokencake_vllm.vllm_adapter.block_accounting import STATES


@pytest.fixture
def make_harness(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SchedulerHarness]:
    def make(space: dict[str, Any] | None = None, **options: Any) -> SchedulerHarness:
        return SchedulerHarness(monkeypatch, {"enabled": True, **(space or {})}, **options)

    return make


def check_budget(engine: SchedulerHarness) -> None:
    budget = engine.scheduler.block_budget()
    assert tuple(budget) == STATES
    assert sum(budget.values()) == engine.pool.num_gpu_blocks - 1
    assert budget["cached"] + budget["empty"] == engine.pool.get_num_free_blocks()
    assert budget["pinned"] <= engine.cache.pinned_blocks
    if not engine.cache.is_busy:
        assert budget["uploading"] == budget["storing"] == 0
    if not engine.scheduler.requests and not engine.scheduler.deferred_frees:
        assert budget["running"] == budget["leaving"] == 0


def play_out(engine: SchedulerHarness, trace: list[tuple[Any, ...]], *, limit: int) -> None:
    """Every block is accounted for after each action, and in the end nobody is left."""
    player = Trace(engine)
    for action in trace:
        player.play(action)
        check_budget(engine)
    engine.run(limit)
    engine.check()
    check_budget(engine)
    assert engine.scheduler.admission.applications.calls == {}


def test_every_block_is_somebodys_at_each_stage_of_a_call(make_harness: MakeHarness) -> None:
    engine = make_harness()
    budgets = [engine.scheduler.block_budget()]
    name = engine.call(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    engine.step()
    budgets.append(engine.scheduler.block_budget())
    while engine.scheduler.requests:
        engine.step()
    budgets.append(engine.scheduler.block_budget())
    engine.run()
    engine.send(protocol.ToolStart(name, "t", "build"))
    budgets.append(engine.scheduler.block_budget())
    engine.wipe()
    engine.send(protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.step()
    budgets.append(engine.scheduler.block_budget())
    engine.run()
    budgets.append(engine.scheduler.block_budget())

    seen = [{state: blocks for state, blocks in budget.items() if blocks} for budget in budgets]
    assert seen[:4] == [
        {"empty": 63},
        {"running": 7, "empty": 56},
        {"storing": 6, "empty": 57},
        {"cached": 6, "empty": 57},
    ]
    # An upload may come in parts, and whether it stays pinned is the Time Scheduler's affair.
    under_way, brought = budgets[4:]
    assert under_way["uploading"] > 0
    assert (brought["uploading"], brought["pinned"] + brought["cached"], brought["empty"]) == (0, 6, 57)


def test_a_load_that_a_call_waits_for_is_told_apart(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.answer(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    engine.wipe()
    engine.call(engine.follow_up(name))
    engine.step()

    assert engine.scheduler.block_budget()["loading"] > 0
    engine.run()


def test_the_account_is_in_the_state_and_in_the_metrics(make_harness: MakeHarness) -> None:
    engine = make_harness()
    engine.call(PROMPT, max_tokens=40)
    engine.step()
    engine.clock.now += 7.0
    engine.call(PROMPT)
    engine.clock.now += 3.0
    drained = engine.scheduler.tokencake_metrics()

    assert engine.scheduler.tokencake_state(None, None, 10)["kv_blocks"]["running"] == 7
    assert drained["labelled"]["kv_blocks"]["running"] == 7
    assert drained["gauges"]["longest_wait_s"] == pytest.approx(3.0)
    assert drained["gauges"]["promised_blocks"] >= 2
    assert as_json(drained)["labelled"] == drained["labelled"]
    engine.run()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("space", [{}, {"guarded": 0, "short_s": 0.0}, {"policy": "paper"}])
def test_whatever_happens_every_block_is_accounted_for_and_every_call_ends(
    space: dict[str, Any], is_async: bool
) -> None:
    @given(st.lists(actions, min_size=10, max_size=50))
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    def play(trace: list[tuple[Any, ...]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            engine = SchedulerHarness(
                patch,
                {"enabled": True, **space},
                num_blocks=40,
                host_blocks=30,
                keep_share=0.5,
                is_async=is_async,
            )
            play_out(engine, trace, limit=2_000)

    play()


def test_what_is_held_for_a_stalled_agent_gives_way_before_a_call_that_runs(
    make_harness: MakeHarness,
) -> None:
    """The pin was left when a short call was first in line; the long one that comes to its place needs it."""
    engine = make_harness({"short_s": 0.0}, num_blocks=31, keep_share=0.9)
    engine.answer([1] * 20, session="old", app="old")
    engine.answer([3] * 150, session="held", app="held", expects_tools={"ls": 0.05}, reuse="extends")
    engine.call([5] * 100, "young", 60, app="young")
    engine.step()
    assert engine.scheduler.block_budget()["pinned"] == 9
    engine.call([6] * 30, "small", 2, app="small")
    engine.call([9] * 250, "old", 2, app="old")
    engine.step()

    assert engine.count("kv_pins", "yielded") == 1
    assert not any(request.num_preemptions for request in engine.scheduler.requests.values())
    engine.run(600)
