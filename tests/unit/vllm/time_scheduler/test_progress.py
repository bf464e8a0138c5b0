"""Loads hold device blocks before their call runs: under pressure every call still comes to its end."""

from __future__ import annotations

import queue
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

from tests.harness.kv_worker import PROMPT, MakeHarness, SchedulerHarness
from tests.harness.scheduler import BLOCK_TOKENS
from tokencake_vllm.plugin import register

POOL = 40


def on_the_host_only(engine: SchedulerHarness, sessions: int, tokens: int) -> dict[str, list[int]]:
    """Sessions whose prefix only the host holds, each with the prompt of its first call."""
    prompts = {f"s{n}": [10_000 * (n + 1) + i for i in range(tokens)] for n in range(sessions)}
    for session, prompt in prompts.items():
        engine.answer(prompt, session=session, expects_tools={"build": 60.0}, reuse="extends")
    engine.wipe()
    return prompts


def come_to_an_end(engine: SchedulerHarness, names: list[str], delay: int) -> None:
    """StepLoop in which each copy takes `delay` steps, until no call is left."""
    ages: dict[int, int] = {}
    for _ in range(3_000):
        if not engine.scheduler.has_requests():
            break
        engine.step()
        for job in list(engine.worker.jobs):
            ages[job.id] = ages.get(job.id, 0) + 1
            if ages[job.id] >= delay:
                engine.finish_job(engine.worker.jobs.index(job))
    engine.run()
    assert [engine.scheduler.registry.calls[name].status for name in names] == ["finished"] * len(names)
    engine.check()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("delay", [1, 5, 40])
def test_calls_that_wait_for_loads_and_hold_all_blocks_come_to_their_end(
    make_harness: MakeHarness, is_async: bool, delay: int
) -> None:
    """All prefixes together fill the device; each call needs more than its prefix before it can run."""
    engine = make_harness(num_blocks=POOL, is_async=is_async, max_tokens_per_step=64)
    prompts = on_the_host_only(engine, sessions=8, tokens=5 * BLOCK_TOKENS + 1)
    names = [
        engine.call(prompt + [7] * 4 + [999] * 12 * BLOCK_TOKENS, session=session, max_tokens=40)
        for session, prompt in prompts.items()
    ]
    come_to_an_end(engine, names, delay)
    assert engine.count("kv_loads", "queued") >= 8


@pytest.mark.parametrize("delay", [1, 5, 40])
def test_running_calls_that_grow_and_calls_that_load_come_to_their_end(make_harness: MakeHarness, delay: int) -> None:
    """Running calls are preempted for want of blocks that loads hold, and wait behind those loads."""
    engine = make_harness(num_blocks=POOL, max_tokens_per_step=64)
    prompts = on_the_host_only(engine, sessions=6, tokens=5 * BLOCK_TOKENS + 1)
    names = [
        engine.call([500_000 + 1_000 * n + i for i in range(60)], session=f"new{n}", max_tokens=200) for n in range(4)
    ]
    for _ in range(8):
        engine.step()
    names += [engine.call(prompt + [7] * 4 + [999] * 40, session=s, max_tokens=100) for s, prompt in prompts.items()]
    come_to_an_end(engine, names, delay)
    assert engine.count("kv_loads", "queued") >= 6


@given(
    sessions=st.integers(1, 8),
    prefix=st.integers(1, 8),
    more=st.lists(st.integers(1, 250), min_size=8, max_size=8),
    answers=st.lists(st.integers(1, 150), min_size=8, max_size=8),
    strangers=st.integers(0, 4),
    delay=st.integers(1, 30),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_is_loaded_under_pressure_the_engine_comes_to_rest(
    make_harness: MakeHarness,
    sessions: int,
    prefix: int,
    more: list[int],
    answers: list[int],
    strangers: int,
    delay: int,
) -> None:
    engine = make_harness(num_blocks=POOL, max_tokens_per_step=64)
    prompts = on_the_host_only(engine, sessions, prefix * BLOCK_TOKENS + 1)
    names: list[Any] = []
    for number in range(strangers):
        names.append(
            engine.call([500_000 + 1_000 * number + i for i in range(60)], session=f"new{number}", max_tokens=100)
        )
        engine.step()
    for (session, prompt), tail, answer in zip(prompts.items(), more, answers, strict=False):
        names.append(engine.call(prompt + [7] * 4 + [999] * tail, session=session, max_tokens=answer))
    come_to_an_end(engine, names, delay)


def test_an_idle_engine_that_was_never_asked_anything_wakes_when_something_is_due(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness()
    woken: list[Any] = []
    core: Any = EngineCoreProc.__new__(EngineCoreProc)
    core.scheduler, core.input_queue, core.aborts_queue = engine.scheduler, queue.Queue(), queue.Queue()
    core.process_input_queue_block = True
    core.is_running = lambda: True
    core._notify_idle_state_callbacks = lambda: None
    core._handle_client_request = lambda kind, _: woken.append(kind)
    register()
    core.has_work = lambda: True
    core._process_input_queue()  # as before the first step
    engine.answer(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    stalls = engine.scheduler.offload.stalls
    stalls.wakeups.set(next(iter(stalls.prefixes.by_id)), engine.clock.now)
    engine.scheduler._arm_waker(engine.clock.now)
    core.has_work = lambda: bool(woken)
    core._process_input_queue()  # ends only if something wakes it
    assert woken == [EngineCoreRequestType.WAKEUP]


def test_the_wait_of_an_idle_engine_is_stock_without_our_scheduler_and_survives_a_broken_one() -> None:
    register()
    register()  # vLLM calls it more than once
    assert not hasattr(EngineCoreProc._process_input_queue.__wrapped__, "__wrapped__")

    class Broken:
        def bind_waker(self, wake: Any) -> None:
            raise ZeroDivisionError("made up")

    for scheduler in (object(), Broken()):
        core: Any = EngineCoreProc.__new__(EngineCoreProc)
        core.scheduler, core.input_queue, core.process_input_queue_block = scheduler, queue.Queue(), True
        core.has_work = lambda: True
        core._process_input_queue()
