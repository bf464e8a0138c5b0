"""The Time Scheduler on the real scheduler and block pool of vLLM, with a worker that remembers what it copied."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.harness.kv_worker import PROMPT, MakeHarness, SchedulerHarness
from tests.harness.scheduler import BLOCK_TOKENS, build_scheduler, make_request
from tests.harness.steps import as_json, run_all
from tokencake import protocol
from tokencake.forecast.roles import Role
from tokencake_vllm.time_scheduler.kv_report import of_session


def blocks_on_host(engine: SchedulerHarness) -> dict[str, int]:
    """Of the calls of the sessions `s` and `t`."""
    prefixes = engine.scheduler.offload.stalls.prefixes
    views = [view for session in ("s", "t") for view in of_session(prefixes, engine.cache, session)]
    return {view["call"]: view["on_host"] for view in views}


def test_a_finished_call_is_on_the_host_and_its_blocks_are_free(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    (kv,) = engine.scheduler.tokencake_state(None, None, 10)["sessions"]["s"]["kv"]
    assert kv == {
        "call": name,
        "phase": "stalled",
        "decision": "offload",
        "blocks": 6,
        "on_device": 6,
        "on_host": 6,
        "pinned": 0,
    }
    assert engine.pool.get_num_free_blocks() == 63
    engine.check()


def test_the_client_is_told_what_was_decided(make_harness: MakeHarness) -> None:
    engine = make_harness()
    told = engine.kv_params[engine.long_stall()]["tokencake"]
    assert (told["decision"], told["why"], told["blocks"], told["stored_blocks"]) == ("offload", "reusable", 6, 6)
    assert told["expected_stall_s"] == pytest.approx(60.0, rel=0.3)


@pytest.mark.parametrize("length", [95, 96, 97, 111, 112, 113])
def test_a_prefix_that_left_the_device_is_loaded_when_the_call_comes(make_harness: MakeHarness, length: int) -> None:
    engine = make_harness()
    name = engine.long_stall(list(range(length)))
    engine.wipe()
    follow_up = engine.answer(engine.follow_up(name))
    assert engine.cached_tokens(follow_up) == (0, (length + 3) // 16 * 16)
    engine.check()


def test_an_upload_makes_the_next_call_an_ordinary_hit(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build", estimate_s=60.0))
    engine.wipe()
    engine.send(protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.run()
    assert engine.count("kv_uploads", "started") == 1
    follow_up = engine.answer(engine.follow_up(name))
    assert engine.cached_tokens(follow_up) == (96, 0)
    assert engine.count("kv_uploads", "used") == 1
    assert engine.count("kv_tokens_saved", "upload") == 96
    assert not engine.cache.pinned
    engine.check()


def test_the_upload_is_timed_by_the_forecast(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build", estimate_s=60.0))
    engine.wipe()
    engine.clock.now += 20.0
    assert not engine.scheduler.has_requests()
    engine.clock.now += 25.0
    assert engine.scheduler.has_requests()
    engine.run()
    assert engine.count("kv_uploads", "started") == 1


def test_a_wrong_forecast_costs_one_copy(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build", estimate_s=60.0))
    engine.wipe()
    for _ in range(10):  # it is displaced again and again, and the agent does not come
        engine.clock.now += 45.0
        engine.run()
        engine.wipe()
    engine.send(protocol.ToolEnd(name, "t", duration_s=450.0))
    engine.run()
    assert engine.count("kv_uploads", "started") == 1
    assert engine.count("kv_copied_bytes", "load") <= 6 * engine.cache.costs.block_bytes
    engine.answer(engine.follow_up(name))
    assert engine.count("kv_uploads", "wasted") == 1
    engine.check()


def test_an_upload_takes_what_is_needed_later_and_on_the_host(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=24)
    soon = engine.answer(PROMPT, session="soon", expects_tools={"build": 60.0}, reuse="extends")
    for number in range(1, 5):
        tokens = [1_000 * number + i for i in range(100)]
        engine.answer(tokens, session=f"late{number}", expects_tools={"sleep": 3_000.0}, reuse="extends")
    assert not engine.cache.on_device(engine.scheduler.offload.stalls.prefixes.by_id[soon].block_hashes)
    engine.send(protocol.ToolEnd(soon, "t", "build", duration_s=60.0))
    engine.run()
    assert engine.count("kv_uploads", "started") == 1
    follow_up = engine.answer(engine.follow_up(soon), session="soon")
    assert engine.cached_tokens(follow_up) == (96, 0)
    engine.check()


def test_an_upload_takes_nothing_that_waiting_calls_need(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=24, max_seqs=1)
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build", estimate_s=60.0))
    engine.wipe()
    running, waiting = (engine.call([n * 1_000 + i for i in range(200)], session=f"w{n}") for n in (1, 2))
    engine.step()
    engine.send(protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.step()
    assert engine.count("kv_uploads", "started") == 0
    engine.run()
    assert {running, waiting} <= set(engine.kv_params)
    engine.check()


def test_a_device_with_room_uploads_before_it_is_due(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build", estimate_s=20.0))
    engine.wipe()
    engine.clock.now += 5.0
    engine.answer([5_000 + i for i in range(30)], session="other", max_tokens=40)
    assert engine.count("kv_uploads", "started") == 1
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (96, 0)
    engine.check()


def test_a_call_that_comes_during_its_upload_waits_for_it(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build"))
    engine.wipe()
    engine.send(protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.step()
    follow_up = engine.call(engine.follow_up(name))
    for _ in range(5):
        assert not engine.step().num_scheduled_tokens
    engine.run()
    assert engine.cached_tokens(follow_up) == (96, 0)
    assert engine.count("kv_uploads", "late") == 1


def test_an_answer_that_comes_back_in_other_tokens_still_ends_the_stall(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness()
    name = engine.answer(PROMPT, max_tokens=40, expects_tools={"build": 60.0}, reuse="extends")
    follow_up = engine.answer([*PROMPT, *[33] * 80])
    assert list(engine.scheduler.offload.stalls.prefixes.by_id) == [follow_up]
    assert name not in engine.scheduler.offload.stalls.prefixes.by_id


def test_a_second_call_waits_for_a_load_instead_of_repeating_it(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall(out_degree=2)
    engine.wipe()
    first = engine.call(engine.follow_up(name, 20))
    second = engine.call(engine.follow_up(name, 30))
    for _ in range(3):
        engine.step()
    assert len(engine.worker.jobs) == 1
    engine.run()
    assert engine.cached_tokens(first) == (0, 96)
    assert engine.cached_tokens(second) == (96, 0)
    engine.check()


def test_a_short_stall_is_kept_on_the_device_and_not_copied(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.answer(PROMPT, expects_tools={"ls": 0.02}, reuse="extends")
    assert engine.kv_params[name]["tokencake"]["decision"] == "keep"
    assert engine.count("kv_stores", "queued") == 0
    engine.wipe()
    follow_up = engine.answer(engine.follow_up(name))
    assert engine.cached_tokens(follow_up) == (96, 0)
    assert not engine.cache.pinned
    engine.check()


def test_a_short_stall_that_becomes_long_is_copied(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.answer(PROMPT, expects_tools={"ls": 0.02}, reuse="extends")
    engine.clock.now += 5.0
    engine.run()
    assert not engine.cache.pinned
    engine.wipe()
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 96)


def test_pins_are_given_up_before_a_call_has_to_wait_for_them(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=20, keep_share=0.9)
    engine.answer(PROMPT, expects_tools={"ls": 0.02}, reuse="extends")
    assert len(engine.cache.pinned) == 1
    big = engine.call([500 + i for i in range(250)], session="other")
    engine.step()
    assert engine.count("kv_pins", "yielded") == 1
    engine.run()
    assert engine.scheduler.registry.calls[big].status == "finished"
    engine.check()


def test_a_final_answer_is_not_copied_and_goes_first(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=24)
    engine.long_stall([900 + i for i in range(100)], session="t")
    engine.answer(PROMPT, reuse="final")
    assert engine.count("kv_stores", "queued") == 1
    engine.step()  # they are put first as a step begins
    queue = engine.pool.free_block_queue.get_all_free_blocks()
    cached = [bytes(block.block_hash)[:-4] for block in queue if block.block_hash is not None]
    assert set(cached[6:]) == set(engine.scheduler.offload.stalls.prefixes.by_id["r1"].block_hashes)
    engine.check()


@pytest.mark.parametrize("event", [protocol.SessionEnd("a//x"), protocol.AppEnd("a")])
def test_what_an_ended_application_leaves_is_reused_first(make_harness: MakeHarness, event: Any) -> None:
    engine = make_harness(num_blocks=24)
    engine.long_stall([900 + i for i in range(100)], session="t", app="b")
    engine.long_stall(session="a//x", app="a")  # used last, so that only the event puts it first
    first = set(engine.scheduler.offload.stalls.prefixes.by_id["r2"].block_hashes)
    engine.send(event)
    engine.step()  # they are put first as a step begins
    queue = engine.pool.free_block_queue.get_all_free_blocks()
    cached = [bytes(block.block_hash)[:-4] for block in queue if block.block_hash is not None]
    assert set(cached[:6]) == first
    assert all(block.block_hash is None for block in queue[: len(queue) - len(cached)])  # behind the empty ones
    assert list(engine.scheduler.offload.stalls.prefixes.by_id) == ["r1"]
    engine.check()


def test_the_end_of_a_run_leaves_what_its_thread_may_extend(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall(session="thread//agent", app="run-1")
    assert engine.send(protocol.AppEnd("run-1")) == ["applied"]
    assert name in engine.scheduler.offload.stalls.prefixes.by_id
    assert engine.scheduler.registry.sessions["thread//agent"].ended is None
    follow_up = engine.answer(engine.follow_up(name), session="thread//agent", app="run-2")
    assert engine.cached_tokens(follow_up) == (96, 0)


def test_a_session_is_an_applications_own_only_below_its_whole_name(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness()
    name = engine.long_stall(session="run-10//agent", app="run-1")
    engine.send(protocol.AppEnd("run-1"))
    assert name in engine.scheduler.offload.stalls.prefixes.by_id


def test_an_end_that_was_wrong_is_not_believed_again(make_harness: MakeHarness) -> None:
    """`session_end`, and more calls of the session after it: the next end drops nothing."""
    engine = make_harness()
    name = engine.long_stall(session="s")
    engine.send(protocol.SessionEnd("s"))
    assert name not in engine.scheduler.offload.stalls.prefixes.by_id
    again = engine.answer(engine.follow_up(name), session="s", expects_tools={"build": 60.0}, reuse="extends")
    engine.send(protocol.SessionEnd("s"))
    assert again in engine.scheduler.offload.stalls.prefixes.by_id


def test_blocks_that_another_session_has_used_are_not_put_first(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=24)
    system = list(range(64))
    engine.answer([*system, *[900 + i for i in range(40)]], session="other", reuse="extends", expects_tools={"x": 60.0})
    engine.answer([*system, *[700 + i for i in range(40)]], session="mine", reuse="final")
    engine.send(protocol.SessionEnd("other"))
    engine.step()
    queue = engine.pool.free_block_queue.get_all_free_blocks()
    cached = [bytes(block.block_hash)[:-4] for block in queue if block.block_hash is not None]
    shared = make_request("probe", [*system, 1], None, 1).block_hashes
    assert not set(cached[:4]) & set(shared)
    engine.check()


def test_a_stall_without_end_is_given_up(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build", deadline_s=100.0))
    engine.clock.now += 101.0
    engine.run()
    assert not engine.scheduler.offload.stalls.prefixes.by_id
    assert engine.count("kv_stalls", "given_up") == 1


def test_several_tools_end_with_the_last(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    for tool in ("t", "u"):
        engine.send(protocol.ToolStart(name, tool, "build", estimate_s=60.0))
    engine.wipe()
    engine.send(protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.run()
    assert engine.count("kv_uploads", "started") == 0
    engine.send(protocol.ToolEnd(name, "u"))
    engine.run()
    assert engine.count("kv_uploads", "started") == 1


def test_an_end_before_the_call_has_ended_starts_the_upload_at_once(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness()
    name = engine.call(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    engine.step()
    engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=0.01))
    engine.run()
    assert engine.scheduler.offload.stalls.prefixes.by_id[name].back_s <= engine.clock.now + 60.0
    engine.check()


def test_a_failed_load_is_computed_and_the_copy_forgotten(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.wipe()
    follow_up = engine.call(engine.follow_up(name))
    engine.step()
    engine.finish_job(ok=False)
    engine.run()
    request = engine.scheduler.registry.calls[follow_up]
    assert request.status == "finished"
    assert engine.count("kv_copy_failures", "load") == 1
    engine.check()


def test_a_failed_store_is_never_a_hit(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.call(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    while not engine.worker.jobs:
        engine.step()
    engine.finish_job(ok=False)
    engine.run()
    assert len(engine.cache.tier) == 0
    engine.wipe()
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 0)
    engine.check()


def test_a_failed_upload_leaves_nothing_behind(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.send(protocol.ToolStart(name, "t", "build"))
    engine.wipe()
    engine.send(protocol.ToolEnd(name, "t"))
    engine.step()
    engine.finish_job(ok=False)
    engine.run()
    assert not engine.cache.pinned
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 0)
    engine.check()


def test_when_every_copy_fails_no_more_are_tried(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=300)
    for number in range(12):
        engine.call([1_000 * number + i for i in range(40)], session=f"s{number}", expects_tools={"build": 60.0})
        while engine.scheduler.has_requests():
            engine.step()
            while engine.worker.jobs:
                engine.finish_job(ok=False)
    assert engine.cache.is_off
    assert engine.count("kv_copy_failures", "store") == 8


def test_a_full_host_keeps_what_is_needed_soonest(make_harness: MakeHarness) -> None:
    engine = make_harness(host_blocks=8)
    soon = engine.long_stall(expects_tools={"test": 20.0})
    later = engine.long_stall([900 + i for i in range(100)], session="t", expects_tools={"build": 600.0})
    engine.check()
    found = {
        view["call"]: view["on_host"]
        for s in ("s", "t")
        for view in of_session(engine.scheduler.offload.stalls.prefixes, engine.cache, s)
    }
    assert found == {soon: 6, later: 2}


def test_what_is_needed_sooner_displaces_what_is_needed_later(make_harness: MakeHarness) -> None:
    engine = make_harness(host_blocks=8)
    later = engine.long_stall(expects_tools={"build": 600.0})
    soon = engine.long_stall([900 + i for i in range(100)], session="t", expects_tools={"test": 20.0})
    found = {
        view["call"]: view["on_host"]
        for s in ("s", "t")
        for view in of_session(engine.scheduler.offload.stalls.prefixes, engine.cache, s)
    }
    assert found == {soon: 6, later: 2}
    engine.check()


def test_reset_prefix_cache_forgets_the_host_too(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.answer(PROMPT[:50], session="k", expects_tools={"ls": 0.01})
    assert engine.scheduler.reset_prefix_cache()
    engine.check()
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 0)


def test_reset_prefix_cache_during_copies_leaves_no_stale_copy(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.call(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    while not engine.worker.jobs:
        engine.step()
    assert engine.scheduler.reset_prefix_cache()
    engine.run()
    engine.check()
    assert len(engine.cache.tier) == 0
    assert engine.cache.tier.free_slots == 200
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 0)


def test_an_aborted_call_is_not_copied(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.call(PROMPT, max_tokens=50, expects_tools={"build": 60.0})
    engine.step()
    engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    engine.run()
    assert engine.count("kv_stores", "queued") == 0
    assert not engine.scheduler.offload.stalls.prefixes.by_id
    engine.check()


def test_a_call_aborted_while_it_loads_gives_its_blocks_back(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.wipe()
    follow_up = engine.call(engine.follow_up(name))
    engine.step()
    engine.scheduler.finish_requests(follow_up, RequestStatus.FINISHED_ABORTED)
    engine.run()
    assert engine.pool.get_num_free_blocks() == 63
    engine.check()


def test_a_preempted_call_loads_what_it_had(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=24)
    for number in range(3):
        engine.call([1_000 * number + i for i in range(100)], session=f"s{number}", max_tokens=60)
    engine.run()
    assert sum(c.preemptions for c in engine.scheduler.registry.calls.values()) > 0
    engine.check()


def test_a_preempted_call_wants_what_it_had_written(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=24)
    for number in range(3):
        engine.call([1_000 * number + i for i in range(100)], session=f"s{number}", max_tokens=60)
    while not any(request.num_preemptions for request in engine.scheduler.requests.values()):
        engine.step(finish_jobs=True)
    lost = next(request for request in engine.scheduler.requests.values() if request.num_preemptions)
    prefix = engine.scheduler.offload.stalls.prefixes.by_id[lost.request_id]
    assert prefix.phase == "waiting"
    assert len(prefix.block_hashes) > lost.num_prompt_tokens // BLOCK_TOKENS
    assert set(prefix.block_hashes) <= set(engine.scheduler.offload.stalls.prefixes.refcounts)
    engine.run()
    engine.check()


def test_plain_requests_are_stored_and_told_nothing(make_harness: MakeHarness) -> None:
    engine = make_harness()
    engine.scheduler.add_request(make_request("plain", PROMPT, None, 4))
    engine.run()
    assert engine.kv_params["plain"] is None
    engine.check()


def test_durations_are_learned_and_the_error_is_observed(make_harness: MakeHarness) -> None:
    engine = make_harness()
    for number in range(10):
        name = engine.answer([1_000 * number + i for i in range(40)], session=f"s{number}")
        engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=3.0))
    forecast = engine.scheduler.offload.stalls.tracker.forecast
    assert forecast.stall(Role("writer"), "build").quantile(0.5) == pytest.approx(3.0, rel=0.3)
    assert len(engine.scheduler.tokencake_metrics()["observed"]["forecast_error_s"]) == 10


def test_the_state_goes_through_json(make_harness: MakeHarness) -> None:
    engine = make_harness()
    engine.long_stall()
    state = engine.scheduler.tokencake_state(None, None, 10)
    assert as_json(state) == state


@pytest.mark.parametrize("policy", ["paper", "lru"])
def test_other_policies_run_the_same_life(make_harness: MakeHarness, policy: str) -> None:
    engine = make_harness(policy=policy, num_blocks=24)
    for number in range(4):
        name = engine.call([1_000 * number + i for i in range(100)], session=f"s{number}", expects_tools={"build": 9.0})
    engine.run()
    engine.answer(engine.follow_up(name), session="s3")
    engine.check()


def test_switched_off_every_step_is_that_of_stock_vllm() -> None:
    traces = []
    for create, host_blocks in ((Scheduler, None), (None, 200)):
        scheduler = build_scheduler(
            create, num_blocks=40, host_blocks=host_blocks, max_tokens_per_step=256, time={"enabled": False}
        )
        for number in range(8):
            text = protocol.Hint(session=f"s{number}").to_json()
            scheduler.add_request(make_request(f"r{number}", [number % 3] * 64 + [100 + number] * 30, text, 30))
        traces.append(run_all(scheduler))
    assert traces[0] == traces[1]
