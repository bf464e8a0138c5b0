"""`reset_prefix_cache`, which vLLM's sleep and weight updates call, at every bad moment: nothing old is served."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.harness.kv_worker import PROMPT, MakeHarness, SchedulerHarness
from tokencake import protocol


def begin_upload(engine: SchedulerHarness) -> str:
    name = engine.long_stall()
    engine.wipe()
    engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.step()
    assert [job.kind for job in engine.worker.jobs] == ["load"]
    return name


def begin_load(engine: SchedulerHarness) -> str:
    name = engine.long_stall()
    engine.wipe()
    follow_up = engine.call(engine.follow_up(name))
    engine.step()
    assert [job.request for job in engine.worker.jobs] == [follow_up]
    return follow_up


def change_weights(engine: SchedulerHarness) -> None:
    """Whatever was computed or copied so far is of the old weights: reading it fails the bench's checks."""
    engine.worker.device = [b"old"] * len(engine.worker.device)
    engine.worker.host = [b"old"] * len(engine.worker.host)


def test_with_an_upload_under_way_the_reset_succeeds_and_the_upload_is_void(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness()
    name = begin_upload(engine)
    assert engine.scheduler.reset_prefix_cache()
    change_weights(engine)
    engine.check()
    engine.run()
    engine.check()
    assert engine.pool.get_num_free_blocks() == 63
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 0)


def test_with_a_queued_upload_nothing_is_copied(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.wipe()
    cache = engine.cache
    assert (
        cache.upload("x", engine.scheduler.offload.stalls.prefixes.by_id[name].block_hashes, 0, 6, lambda ok: None) == 6
    )
    assert engine.scheduler.reset_prefix_cache()
    engine.run()
    assert not engine.worker.jobs
    assert engine.pool.get_num_free_blocks() == 63
    engine.check()


def test_with_a_store_under_way_the_copy_is_forgotten_and_its_blocks_are_free(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness()
    name = engine.call(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    while not engine.worker.jobs:
        engine.step()
    assert engine.scheduler.reset_prefix_cache()
    change_weights(engine)
    assert engine.pool.get_num_free_blocks() == 63
    engine.finish_job(ok=False)  # its source was overwritten meanwhile: that is no failure of the host memory
    engine.run()
    assert engine.count("kv_copy_failures", "store") == 0
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 0)
    engine.check()


def test_running_calls_compute_again(make_harness: MakeHarness) -> None:
    engine = make_harness()
    names = [engine.call([900 + 10 * n, *PROMPT], session=f"s{n}", max_tokens=20) for n in range(3)]
    for _ in range(4):
        engine.step()
    assert engine.scheduler.running
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    change_weights(engine)
    assert engine.count("kv_stores", "queued") == 0  # what a preempted call leaves is old too
    engine.run()
    assert {engine.scheduler.registry.calls[name].status for name in names} == {"finished"}
    engine.check()


def test_a_call_whose_load_has_ended_computes_again(make_harness: MakeHarness) -> None:
    engine = make_harness()
    follow_up = begin_load(engine)
    # The report comes with a step, and the call starts with the next: the reset is between them.
    engine.finish_job()
    engine.step()
    assert engine.scheduler.requests[follow_up].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    change_weights(engine)
    engine.run()
    assert engine.scheduler.registry.calls[follow_up].status == "finished"
    engine.check()


def test_with_a_load_under_way_vllm_refuses_and_the_call_computes(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness()
    follow_up = begin_load(engine)
    with pytest.raises(RuntimeError, match="remote KV transfer"):
        engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    change_weights(engine)
    engine.run()
    assert engine.scheduler.registry.calls[follow_up].status == "finished"
    engine.check()


def test_pins_do_not_make_the_reset_fail(make_harness: MakeHarness) -> None:
    engine = make_harness()
    engine.answer(PROMPT, expects_tools={"ls": 0.02}, reuse="extends")
    assert engine.cache.pinned
    assert engine.scheduler.reset_prefix_cache()
    engine.check()


@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_sleep_and_wake_as_the_engine_does_it(make_harness: MakeHarness, mode: str) -> None:
    """What `EngineCore.sleep(level=1)` asks of the scheduler; memory is discarded in between."""
    engine = make_harness()
    stalled = begin_upload(engine)
    running = engine.call([500, *PROMPT], session="t", max_tokens=30)
    engine.step()
    scheduler = engine.scheduler
    if mode == "abort":
        scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    scheduler.set_pause_state(PauseState.PAUSED_NEW if mode == "abort" else PauseState.PAUSED_ALL)
    engine.run()  # the engine steps until there is no work: copies under way end first
    assert not engine.cache.is_busy
    assert scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    change_weights(engine)
    engine.clock.now += 500.0  # timers of stalled agents are due while the engine sleeps
    engine.run()
    engine.send(protocol.ToolProgress(stalled, "t", fraction=0.5))
    engine.run()
    assert not engine.worker.jobs
    scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    follow_up = engine.answer(engine.follow_up(stalled))
    assert engine.cached_tokens(follow_up) == (0, 0)
    assert scheduler.registry.calls[running].status == ("aborted" if mode == "abort" else "finished")
    engine.check()
