"""Calls of young applications give way to an old one's: the room is that one's, nothing is lost, and it ends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.sched.interface import PauseState

from tests.harness.kv_worker import MakeHarness, SchedulerHarness
from tests.harness.scheduler import make_request
from tests.unit.vllm.test_both_schedulers import play_out
from tests.unit.vllm.time_scheduler.test_traces import Trace, actions

EAGER = {
    "enabled": True,
    "swap_oldest": 9,
    "swap_from": 1,
    "swap_share": 0.0,
    "swap_patience_tokens": 0,
    "short_s": 0.0,
}
"""Swaps out whenever it can."""


@pytest.fixture
def make_harness(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SchedulerHarness]:
    def make(space: dict[str, Any] | None = None, **options: Any) -> SchedulerHarness:
        return SchedulerHarness(monkeypatch, {**EAGER, **(space or {})}, **options)

    return make


def old_young_and_younger(engine: SchedulerHarness) -> None:
    """Two young calls fill the device, after a call of an old application."""
    engine.answer([1] * 20, session="old", app="old")
    engine.call([5] * 100, "young", 60, app="young")
    engine.call([6] * 100, "younger", 60, app="younger")
    for _ in range(3):
        engine.step(finish_jobs=True)


def steps_until_started(engine: SchedulerHarness, name: str, *, limit: int = 60, finish_jobs: bool = True) -> int:
    for number in range(limit):
        if engine.step(finish_jobs=finish_jobs).num_scheduled_tokens.get(name):
            return number
    raise AssertionError(f"{name} did not start in {limit} steps")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_young_application_is_swapped_out_for_an_old_one_and_loses_nothing(
    make_harness: MakeHarness, is_async: bool
) -> None:
    engine = make_harness(num_blocks=20, is_async=is_async)
    old_young_and_younger(engine)
    engine.call([9] * 150, "old", 2, app="old")
    swapped = engine.step(finish_jobs=True)
    assert engine.count("space_swaps") == 1
    assert swapped.preempted_req_ids == {"r3"}
    assert "r3" not in swapped.num_scheduled_tokens, "it does not come back in the step that took its memory"
    request = engine.scheduler.requests["r3"]
    for _ in range(20):
        if found := engine.step(finish_jobs=True).num_scheduled_tokens.get("r3"):
            break
    assert 0 < found <= 16 + 2, "the host brought all but the last block"
    assert engine.count("space_swaps") == 1
    words = [entry["words"] for entry in engine.scheduler.tokencake_decisions("r3", None, 100)["decisions"]]
    assert "was swapped out for old, a more senior application" in words
    engine.run(600)
    assert request.num_output_tokens == 60
    engine.check()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_nobody_takes_what_was_given_up_while_the_copy_is_under_way(make_harness: MakeHarness, is_async: bool) -> None:
    engine = make_harness(num_blocks=20, is_async=is_async)
    old_young_and_younger(engine)
    head = engine.call([9] * 150, "old", 2, app="old")
    engine.call([8] * 10, "newcomer", 2, app="newcomer")
    for _ in range(10):
        output = engine.step()  # no copy ends
        assert not {"r3", head, "r5"} & set(output.num_scheduled_tokens)
    steps_until_started(engine, head)
    assert engine.count("space_swaps") == 1
    engine.run(600)
    engine.check()


def test_a_branch_beside_its_running_sibling_does_not_come_back_first(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness({"swap_patience_tokens": 20}, num_blocks=120, max_tokens_per_step=2_000)
    engine.answer([1] * 20, session="old", app="old")
    for branch in range(2):
        text = [3] * 640 + [50 + branch] * 400
        engine.call(text, f"y{branch}", 300, app="young", expected_output_tokens=300)
    for _ in range(60):
        engine.step(finish_jobs=True)
    free = engine.pool.get_num_free_blocks()
    head = engine.call([9] * (16 * (free + 10)), "old", 2, app="old")
    assert steps_until_started(engine, head) <= 3
    assert engine.count("space_swaps") == 1
    engine.run(1_500)
    engine.check()


@pytest.mark.parametrize("claim", [None, 1])
def test_a_claim_to_be_nearly_done_holds_until_it_is_broken(make_harness: MakeHarness, claim: int | None) -> None:
    engine = make_harness({"swap_patience_tokens": 128}, num_blocks=20)
    engine.answer([1] * 20, session="old", app="old")
    engine.call([5] * 100, "young", 190, app="young", expected_output_tokens=claim)
    engine.call([6] * 60, "younger", 190, app="younger", expected_output_tokens=claim)
    for _ in range(3):
        engine.step(finish_jobs=True)
    head = engine.call([9] * 200, "old", 2, app="old")
    assert steps_until_started(engine, head) <= 5
    assert engine.count("space_swaps") == 2
    engine.run(900)


@pytest.mark.parametrize("is_v2", [False, True], ids=["runner-v1", "runner-v2"])
def test_what_has_to_be_computed_again_is_counted_and_ends_the_swapping(make_harness: MakeHarness, is_v2: bool) -> None:
    """The V2 runner is told of calls that come back as of new ones."""
    engine = make_harness(num_blocks=20, host_blocks=1)
    engine.scheduler.use_v2_model_runner = is_v2
    old_young_and_younger(engine)
    engine.call([9] * 150, "old", 2, app="old")
    steps_until_started(engine, "r4")
    steps_until_started(engine, "r3")
    assert engine.scheduler.admission.swap._recompute_budget.lost_tokens > 60
    swaps = engine.count("space_swaps")
    engine.call([4] * 150, "old", 2, app="old")
    engine.run(900)
    assert engine.count("space_swaps") == swaps


def test_blocks_that_others_hold_too_are_not_counted_as_freed(make_harness: MakeHarness) -> None:
    """All have one system prompt of 20 blocks: the young ones together would free far too little."""
    engine = make_harness({"swap_from": 2}, num_blocks=50)
    engine.answer([1] * 20, session="old", app="old")
    for name in ("keep", "a", "b", "c"):
        engine.call([3] * 320 + [ord(name[0])] * 20, name, 300, app=name)
    for _ in range(4):
        engine.step(finish_jobs=True)
    engine.call([9] * (16 * 40), "old", 2, app="old")
    for _ in range(8):
        engine.step(finish_jobs=True)
    assert engine.count("space_swaps") == 0
    engine.run(1_500)


def test_nobody_gives_way_where_the_first_in_line_would_lose_what_it_shares_with_them(
    make_harness: MakeHarness,
) -> None:
    """What it was to hit goes with the call that holds it: both together would not make room."""
    engine = make_harness(num_blocks=60, max_tokens_per_step=2_000)
    engine.answer([1] * 20, session="old", app="old")
    engine.call([4] * 300, "middle", 300, app="middle")
    engine.call([3] * 320 + [5] * 40, "young", 300, app="young")
    for _ in range(10):
        engine.step(finish_jobs=True)
    free = engine.pool.get_num_free_blocks()
    engine.call([3] * 320 + [9] * (16 * (free + 20)), "old", 2, app="old")
    for _ in range(8):
        engine.step(finish_jobs=True)
        assert engine.scheduler.admission.swap._beneficiary is None
    assert engine.count("space_swaps") == 0
    engine.run(1_500)


def test_a_slow_copy_is_no_reason_never_to_ask_again(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=20)
    old_young_and_younger(engine)
    head = engine.call([9] * 150, "old", 2, app="old")
    engine.step()
    engine.clock.now += 1.5
    engine.step()
    assert engine.scheduler.admission.swap._beneficiary is None, "others may go on"
    assert not engine.scheduler.admission.applications.calls[head].swap_failed
    reasons = {key[1] for key in engine.scheduler.registry.counts if key[0] == "space_refusals"}
    assert "kept" in reasons
    engine.run(600)


def test_only_an_application_that_came_earlier_is_given_way_to(make_harness: MakeHarness) -> None:
    """A client that names each call another application, and calls it short, pushes nobody out."""
    engine = make_harness({"short_s": 1.5}, num_blocks=30)
    engine.call([5] * 200, "veteran", 250, app="veteran")
    for _ in range(50):
        engine.step(finish_jobs=True)
    engine.scheduler.admission.applications.calls["r1"].app.served_s = 10.0
    head = engine.call([9] * 220, "new", 20, app="fresh", expected_output_tokens=1)
    for _ in range(10):
        engine.step(finish_jobs=True)
    assert head in engine.scheduler.requests
    assert engine.count("space_swaps") == 0
    engine.run(1_500)


def test_a_call_that_does_not_start_for_another_reason_is_given_way_to_once(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness(num_blocks=20)
    engine.scheduler.lora_config = SimpleNamespace(max_loras=1)

    def with_lora(name: str, number: int) -> str:
        engine.scheduler.requests[name].lora_request = SimpleNamespace(
            lora_int_id=number, lora_name=str(number), lora_path=""
        )
        return name

    engine.answer([1] * 20, session="old", app="old")
    with_lora(engine.call([5] * 100, "young", 150, app="young"), 1)
    with_lora(engine.call([6] * 100, "younger", 150, app="younger"), 1)
    for _ in range(3):
        engine.step(finish_jobs=True)
    head = with_lora(engine.call([9] * 150, "old", 2, app="old"), 2)
    for _ in range(5):
        assert "r3" not in engine.step(finish_jobs=True).num_scheduled_tokens
    engine.clock.now += 1.5
    assert steps_until_started(engine, "r3") <= 3
    assert engine.count("space_swaps") == 1
    engine.run(2_500)
    assert head not in engine.scheduler.requests
    assert engine.count("space_swaps") == 1
    engine.check()


def test_a_call_that_loads_its_prefix_for_long_has_started(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=20)
    name = engine.answer([1] * 130, session="old", app="old", expects_tools={"build": 60.0}, reuse="extends")
    engine.wipe()
    engine.call([5] * 100, "young", 60, app="young")
    engine.call([6] * 100, "younger", 60, app="younger")
    for _ in range(3):
        engine.step(finish_jobs=True)
    head = engine.call(engine.follow_up(name), "old", 2, app="old")
    for _ in range(5):
        engine.step()
        for place, job in reversed(list(enumerate(engine.worker.jobs))):
            if job.kind == "store":
                engine.finish_job(place)
    assert engine.count("space_swaps") == 1
    assert engine.scheduler.requests[head].status.name == "WAITING_FOR_REMOTE_KVS"
    engine.clock.now += 1.5
    engine.step()
    assert not engine.scheduler.admission.applications.calls[head].swap_failed
    engine.run(600)
    engine.check()


def test_calls_without_a_hint_neither_push_nor_are_pushed(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=20)
    engine.answer([1] * 20, session="old", app="old")
    for number in (5, 6):
        engine.scheduler.add_request(make_request(f"plain{number}", [number] * 100, None, 60))
    for _ in range(3):
        engine.step(finish_jobs=True)
    engine.call([9] * 150, "old", 2, app="old")
    engine.run(600)
    old_young_and_younger(engine)
    engine.scheduler.add_request(make_request("plain", [9] * 150, None, 4))
    engine.run(600)
    assert engine.count("space_swaps") == 0


def test_nobody_is_swapped_out_for_a_call_that_needs_little(make_harness: MakeHarness) -> None:
    for share, swaps in ((0.6, 0), (0.5, 1)):
        engine = make_harness({"swap_share": share}, num_blocks=20)
        old_young_and_younger(engine)
        engine.call([9] * 150, "old", 2, app="old")  # 10 of 19 blocks
        engine.step(finish_jobs=True)
        assert engine.count("space_swaps") == swaps
        engine.run(600)


def test_nobody_is_swapped_out_where_the_host_cannot_bring_it_back(
    make_harness: MakeHarness,
) -> None:
    engine = make_harness(num_blocks=20, host_blocks=0)
    old_young_and_younger(engine)
    engine.call([9] * 150, "old", 2, app="old")
    engine.run(600)
    assert engine.count("space_swaps") == 0


def test_nobody_is_swapped_out_while_the_engine_is_paused(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=20)
    old_young_and_younger(engine)
    running = [request.request_id for request in engine.scheduler.running]
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.call([9] * 150, "old", 2, app="old")
    for _ in range(20):
        engine.step(finish_jobs=True)
    assert [request.request_id for request in engine.scheduler.running] == running
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run(600)
    assert engine.count("space_swaps") > 0


def test_a_pin_goes_before_anybody_is_swapped_out(make_harness: MakeHarness) -> None:
    engine = make_harness(num_blocks=31, keep_share=0.9)
    engine.answer([1] * 20, session="old", app="old")
    engine.answer([3] * 150, session="held", app="held", expects_tools={"ls": 0.05}, reuse="extends")
    engine.call([5] * 100, "young", 60, app="young")
    engine.step()
    engine.call([9] * 250, "old", 2, app="old")
    engine.step()
    assert engine.count("kv_pins", "yielded") == 1
    assert engine.count("space_swaps") == 0
    engine.run(600)


crowded = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(60, 160), st.integers(20, 60)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    actions,
)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_whatever_happens_beside_swaps_every_block_is_accounted_for_and_every_call_ends(is_async: bool) -> None:
    swaps = []

    @given(st.lists(crowded, min_size=20, max_size=60))
    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def play(trace: list[tuple[Any, ...]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tokencake_vllm.space_scheduler.swap._MAX_RECOMPUTED_SHARE", 1.0)
            patch.setattr(Trace, "_call", with_an_application_each)
            engine = SchedulerHarness(patch, EAGER, num_blocks=30, is_async=is_async)
            play_out(engine, trace, limit=3_000)
            swaps.append(engine.count("space_swaps"))

    play()
    assert sum(swaps) > 0


def with_an_application_each(trace: Trace, session: int, tokens: list[int], output: int) -> None:
    trace.last[session] = tokens
    trace.engine.clock.now += 0.01
    trace.names.append(trace.engine.call(tokens, f"s{session}", output, app=f"a{session}"))
    trace.latest[session] = trace.names[-1]
