"""Whom a swap takes, for whom the room is kept and for how long, each at its bound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.unit.vllm.vllm_adapter.pools import BLOCK_TOKENS, Device, keys
from tokencake.protocol import Hint
from tokencake.registry.registry import Registry
from tokencake.space_scheduler.applications import AppTracker
from tokencake.space_scheduler.explain import DecisionExplainer
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake_vllm.component import ErrorContainment
from tokencake_vllm.space_scheduler.admission_gate import AdmissionGate
from tokencake_vllm.space_scheduler.ranked_queue import RankedQueue
from tokencake_vllm.space_scheduler.swap import Swap
from tokencake_vllm.vllm_adapter.block_view import BlockView


class Engine:
    """A device of 100 blocks; the oldest application may have calls of all others swapped out."""

    def __init__(self, **settings: Any) -> None:
        self.device = Device(100)
        self.applications = AppTracker({}.get, answer_quantile=0.8)
        self.device.manager.watermark_blocks = 0
        self.scheduler: Any = SimpleNamespace(
            kv_cache_manager=self.device.manager,
            requests=self.device.requests,
            running=[],
            waiting=RankedQueue(),
            pause_state=PauseState.UNPAUSED,
            _inflight_prefills=[],
            deferred_frees=[],
        )
        self.offload: Any = SimpleNamespace(can_restore=True, storing=dict)
        self.policy: Any = SimpleNamespace(swaps=True, rank_reasons=())
        chosen = SpaceSettings(**{"swap_oldest": 1, "swap_from": 1, **settings})
        view, registry = BlockView(self.device.manager, BLOCK_TOKENS), Registry()
        gate = AdmissionGate(
            chosen,
            self.policy,
            self.applications,
            view,
            DecisionExplainer(chosen, self.policy, self.applications, registry),
            registry,
            ErrorContainment(lambda: None),
        )
        self.swap = Swap(self.scheduler, chosen, self.policy, self.applications, view, gate, self.offload)

    def add(self, name: str, tokens: int, now: float, *, is_plain: bool = False, **hint: Any) -> Any:
        given = None if is_plain else Hint(session=name, app=name.partition("/")[0], **hint)
        self.applications.add(name, given, prompt_tokens=tokens, max_tokens=1_000, now=now)
        request = self.device.request(name, num_tokens=tokens, max_tokens=1_000, num_prompt_tokens=tokens)
        request.num_computed_tokens, request.num_in_flight_tokens = tokens, 0
        return request

    def wait(self, name: str, blocks: int, **given: Any) -> Any:
        """A call of the oldest application."""
        request = self.add(name, blocks * BLOCK_TOKENS, 0.0, **given)
        request.num_computed_tokens = 0
        self.scheduler.waiting.add_request(request)
        return request

    def run(self, name: str, blocks: int, now: float = 1.0, **given: Any) -> Any:
        request = self.add(name, blocks * BLOCK_TOKENS, now, **given)
        self.device.hold(name, self.device.take(keys(name, blocks)))
        self.device.requests[name] = request
        request.status = RequestStatus.RUNNING
        self.scheduler.running.append(request)
        return request

    def choose(self, now: float = 10.0) -> list[str]:
        ages = {call.request_id: (call.app.first_seen_s,) for call in self.applications.calls.values()}
        return [request.request_id for request in self.swap.choose(ages, now)]


def test_a_call_of_the_oldest_application_that_does_not_fit_has_a_young_one_swapped_out() -> None:
    engine = Engine()
    engine.wait("old", 60)
    engine.run("young", 50)
    assert engine.choose() == ["young"]

    call = engine.applications.calls["young"]
    assert (call.swaps, call.swapped_for) == (1, engine.applications.calls["old"].app)


@pytest.mark.parametrize(("need", "chosen"), [(50, []), (51, ["young"])])
def test_what_fits_needs_no_swap(need: int, chosen: list[str]) -> None:
    engine = Engine()
    engine.wait("old", need)
    engine.run("young", 50)

    assert engine.choose() == chosen


@pytest.mark.parametrize(("need", "chosen"), [(29, []), (30, ["young"])])
def test_a_call_that_needs_little_finds_room_soon(need: int, chosen: list[str]) -> None:
    engine = Engine(swap_share=0.3)
    engine.wait("old", need)
    engine.run("young", 80)

    assert engine.choose() == chosen


@pytest.mark.parametrize(("left", "chosen"), [(64, []), (65, ["young"])])
def test_room_that_comes_soon_by_itself_is_waited_for(left: int, chosen: list[str]) -> None:
    engine = Engine(swap_patience_tokens=64)
    engine.wait("old", 60)
    engine.run("young", 50, expected_output_tokens=left)

    assert engine.choose() == chosen


@pytest.mark.parametrize(
    ("need", "chosen"), [(58, ["young"]), (59, [])], ids=["a block for each that runs", "one is missing"]
)
def test_what_is_short_is_the_need_and_a_block_for_each_call_that_runs(need: int, chosen: list[str]) -> None:
    engine = Engine()
    engine.wait("old", need)
    engine.run("young", 30)
    engine.run("plain", 40, is_plain=True)

    assert engine.choose() == chosen


@pytest.mark.parametrize(("need", "chosen"), [(54, ["young"]), (55, [])])
def test_watermark_and_prompts_that_are_not_allocated_yet_are_short_too(need: int, chosen: list[str]) -> None:
    engine = Engine()
    engine.device.manager.watermark_blocks = 1
    engine.wait("old", need)
    engine.run("young", 30)
    engine.run("plain", 40, is_plain=True).num_tokens += 3 * BLOCK_TOKENS

    assert engine.choose() == chosen


@pytest.mark.parametrize("source", ["a copy to the host", "the step under way"])
def test_blocks_that_come_free_by_themselves_are_as_good_as_free(source: str) -> None:
    engine = Engine()
    engine.wait("old", 58)
    engine.run("young", 30)
    engine.run("plain", 40, is_plain=True)
    held = engine.device.take(keys("held", 2))
    assert engine.choose() == [], "two of the thirty are held"

    if source == "a copy to the host":
        engine.offload.storing = lambda: {block.block_id: 1 for block in held}
    else:
        engine.scheduler.deferred_frees = [(1, held)]
    assert engine.choose() == ["young"]


@pytest.mark.parametrize(("total", "chosen"), [(99, ["young"]), (100, [])])
def test_blocks_that_the_waiting_call_will_hit_do_not_come_free_for_it(total: int, chosen: list[str]) -> None:
    engine = Engine()
    engine.wait("old", total).block_hashes = keys("young", 20)
    engine.run("young", 50)

    # Of 100 it needs 80, so that with a block to grow 31 are short; of the 50 of the other, 20 stay.
    assert engine.choose() == chosen


def test_nobody_is_swapped_out_for_an_application_that_is_not_among_the_oldest() -> None:
    engine = Engine(swap_from=0)
    engine.run("older", 50, now=-1.0)
    engine.wait("old", 60)

    assert engine.choose() == []


def test_calls_without_a_hint_or_whose_prompt_is_not_computed_stay() -> None:
    engine = Engine()
    engine.wait("old", 60)
    request = engine.run("young", 25)
    engine.run("plain", 25, is_plain=True)
    request.num_computed_tokens -= 1
    assert engine.choose() == []
    request.num_computed_tokens += 1
    assert engine.choose() == ["young"]


def test_what_calls_of_one_application_share_comes_free_when_all_of_them_give_way() -> None:
    engine = Engine()
    engine.wait("old", 61)
    first, second = engine.run("young/1", 10), engine.run("young/2", 10)
    shared = engine.device.take(keys("shared", 30))
    engine.device.pool.touch(shared)
    for request in (first, second):
        engine.device.tables[request.request_id] = [*shared, *engine.device.tables[request.request_id]]
        request.num_tokens += 30 * BLOCK_TOKENS
    assert engine.choose() == ["young/1", "young/2"], "13 are short: ten would not do"

    engine = Engine()
    engine.wait("old", 58)
    first, second = engine.run("young/1", 10), engine.run("young/2", 40)
    assert engine.choose() == ["young/1"], "where one is enough the smaller one goes"


@pytest.mark.parametrize(
    "obstacle",
    ["switched off", "nobody waits", "the host is off", "paused", "loads", "plain", "in vain", "too much lost"],
)
def test_nobody_is_swapped_out_where_that_would_be_of_no_use(obstacle: str) -> None:
    engine = Engine()
    request = engine.wait("old", 60, is_plain=obstacle == "plain")
    engine.run("young", 50)
    match obstacle:
        case "switched off":
            engine.policy.swaps = False
        case "nobody waits":
            engine.scheduler.waiting.pop_request()
        case "the host is off":
            engine.offload.can_restore = False
        case "paused":
            engine.scheduler.pause_state = next(state for state in PauseState if state != PauseState.UNPAUSED)
        case "loads":
            request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        case "in vain":
            engine.applications.calls["old"].swap_failed = True
        case "too much lost":
            engine.swap._recompute_budget.add(1_000, 6)

    assert engine.choose() == []


def test_a_loss_within_the_bound_is_no_obstacle() -> None:
    engine = Engine()
    engine.wait("old", 60)
    engine.run("young", 50)
    engine.swap._recompute_budget.add(1_000, 5)

    assert engine.choose() == ["young"]


# --- the room that was made ---------------------------------------------------------------------------


def swapped() -> Engine:
    """At 10 s a young call gave way to one of the oldest application that needs 60 of 100 blocks."""
    engine = Engine()
    engine.wait("old", 60)
    engine.wait("other", 5)
    engine.run("young", 50)
    assert engine.choose(10.0) == ["young"]
    engine.device.pool.free_blocks(engine.device.tables.pop("young"))
    return engine


def test_the_room_is_kept_for_the_one_for_whom_it_was_made() -> None:
    engine = swapped()

    assert [engine.swap.may_start(name, 10.5) for name in ("old", "other", "young")] == [True, False, False]
    assert engine.choose(10.5) == [], "one swap at a time"


def test_the_room_is_anyones_when_that_one_has_started_or_is_gone() -> None:
    engine = swapped()
    engine.device.requests["old"].status = RequestStatus.RUNNING
    assert engine.swap.may_start("other", 10.5)
    engine = swapped()
    del engine.device.requests["old"]
    assert engine.swap.may_start("other", 10.5)
    assert Engine().swap.may_start("anyone", 0.0)


def test_the_room_is_kept_for_a_second_and_one_that_did_not_start_in_it_was_given_way_to_in_vain() -> None:
    engine = swapped()
    assert not engine.swap.may_start("other", 11.0)
    assert not engine.applications.calls["old"].swap_failed
    assert engine.swap.may_start("other", 11.01)
    assert engine.applications.calls["old"].swap_failed


@pytest.mark.parametrize(("held", "swap_failed"), [(40, True), (41, False)])
def test_it_was_not_in_vain_where_there_was_no_room(held: int, swap_failed: bool) -> None:
    engine = swapped()
    engine.device.take(keys("x", held))
    assert engine.swap.may_start("other", 12.0)
    assert engine.applications.calls["old"].swap_failed == swap_failed


def test_it_was_not_in_vain_while_the_engine_admitted_nothing() -> None:
    engine = swapped()
    engine.scheduler.pause_state = next(state for state in PauseState if state != PauseState.UNPAUSED)
    assert engine.swap.may_start("other", 12.0)
    assert not engine.applications.calls["old"].swap_failed


# --- what it has cost ---------------------------------------------------------------------------------


def output(**tokens: int) -> Any:
    return SimpleNamespace(num_scheduled_tokens=tokens, total_num_scheduled_tokens=sum(tokens.values()))


def test_what_a_call_that_comes_back_computes_again_is_lost_and_counted_once() -> None:
    engine = swapped()
    engine.swap.note_step(output(other=30))
    assert (engine.swap._recompute_budget.computed_tokens, engine.swap._recompute_budget.lost_tokens) == (30, 0)

    request = engine.device.requests["young"]
    request.num_tokens, request.num_computed_tokens = 810, 790  # the step's 100 included
    engine.swap.note_step(output(young=100, other=1))
    assert (engine.swap._recompute_budget.computed_tokens, engine.swap._recompute_budget.lost_tokens) == (131, 20 + 100)
    engine.swap.note_step(output(young=1))
    assert engine.swap._recompute_budget.lost_tokens == 120


def test_a_call_that_ended_while_it_was_away_has_lost_nothing() -> None:
    engine = swapped()
    engine.applications.end("young", 0, is_aborted=True, now=11.0)
    del engine.device.requests["young"]
    engine.swap.note_step(output(other=30))

    assert engine.swap._recompute_budget.lost_tokens == 0
    assert engine.swap._swapped_out == set()


@pytest.mark.parametrize(("written", "left"), [(0, 100), (99, 1), (100, 900), (150, 850)])
def test_a_call_that_has_written_more_than_expected_may_go_on_to_its_limit(written: int, left: int) -> None:
    engine = Engine()
    request = engine.run("young", 10, expected_output_tokens=100)
    request.num_output_tokens = written
    assert engine.swap._left_tokens(request) == left
    del engine.applications.calls["young"]
    assert engine.swap._left_tokens(request) == 1_000 - written
