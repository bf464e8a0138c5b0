"""What is read of requests in vLLM's scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.unit.vllm.vllm_adapter.pools import Device, ids, keys
from tokencake_vllm.vllm_adapter.requests import (
    admitted_requests,
    cached_tokens,
    compute_loads_again,
    computed_blocks,
    first_slots,
    has_admitted,
    has_prompt_computed,
    is_aborted,
    is_answered,
    is_paused,
    leaving_blocks,
    queued_requests,
    started_requests,
)


def request(**fields: Any) -> Any:
    usual = {"request_id": "r", "num_computed_tokens": 0, "num_in_flight_tokens": 0, "num_prompt_tokens": 40}
    return SimpleNamespace(**{**usual, **fields})


def scheduler(**fields: Any) -> Any:
    return SimpleNamespace(**{"running": [], "_inflight_prefills": [], "block_size": 16, **fields})


@pytest.mark.parametrize(
    ("status", "aborted", "answered"),
    [
        (RequestStatus.FINISHED_ABORTED, True, False),
        (RequestStatus.FINISHED_ERROR, True, False),
        (RequestStatus.FINISHED_STOPPED, False, True),
        (RequestStatus.FINISHED_LENGTH_CAPPED, False, True),
        (RequestStatus.RUNNING, False, False),
    ],
)
def test_a_request_ends_with_an_answer_or_without(status: Any, aborted: bool, answered: bool) -> None:
    assert (is_aborted(request(status=status)), is_answered(request(status=status))) == (aborted, answered)


def test_an_engine_that_admits_nothing_is_paused() -> None:
    assert not is_paused(scheduler(pause_state=PauseState.UNPAUSED))
    assert all(is_paused(scheduler(pause_state=state)) for state in PauseState if state != PauseState.UNPAUSED)


def test_requests_have_blocks_while_they_run_and_while_their_prefix_is_loaded() -> None:
    runs, loads = request(status=RequestStatus.RUNNING), request(status=RequestStatus.WAITING_FOR_REMOTE_KVS)

    assert admitted_requests(scheduler(running=[runs], _inflight_prefills=[runs, loads])) == [runs, loads]
    assert not has_admitted(scheduler())
    assert has_admitted(scheduler(running=[runs]))
    assert has_admitted(scheduler(_inflight_prefills=[loads]))


@pytest.mark.parametrize(
    ("computed", "in_flight", "is_computed"), [(40, 0, True), (39, 0, False), (41, 1, True), (40, 1, False)]
)
def test_a_prompt_is_computed_without_what_is_in_flight(computed: int, in_flight: int, is_computed: bool) -> None:
    assert has_prompt_computed(request(num_computed_tokens=computed, num_in_flight_tokens=in_flight)) == is_computed


@pytest.mark.parametrize(
    ("computed", "in_flight", "blocks"),
    [(0, 0, 0), (0, 5, 0), (15, 0, 0), (16, 0, 1), (33, 1, 2), (32, 1, 1), (99, 0, 3)],
)
def test_full_blocks_are_computed_without_what_is_in_flight(computed: int, in_flight: int, blocks: int) -> None:
    device = Device()
    table = device.take(keys("k", 4))
    device.hold("r", table)
    one = request(num_computed_tokens=computed, num_in_flight_tokens=in_flight, block_hashes=keys("k", 3))
    hashes, found = computed_blocks(scheduler(kv_cache_manager=device.manager), one)

    assert (hashes, ids(found)) == (keys("k", 3)[:blocks], ids(table)[:blocks])


def test_a_request_without_blocks_has_computed_none() -> None:
    manager = SimpleNamespace(coordinator=SimpleNamespace(get_blocks=lambda _: ()))

    one = request(num_computed_tokens=32, block_hashes=keys("k", 2))
    assert computed_blocks(scheduler(kv_cache_manager=manager), one) == ([], [])


def test_queues_are_read_in_their_order() -> None:
    queued = scheduler(kv_holding_waiting=["a"], waiting=["b", "c"], deferred_frees=[(1, ["x", "y"]), (2, ["z"])])

    assert list(queued_requests(queued)) == ["a", "b", "c"]
    assert list(leaving_blocks(queued)) == ["x", "y", "z"]


def test_a_request_tells_what_it_found_once() -> None:
    found = request(prefill_stats=SimpleNamespace(num_local_cached_tokens=48, num_external_cached_tokens=16))
    output: Any = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id="r"), SimpleNamespace(req_id="s")],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"t"}),
    )
    known = scheduler(requests={"r": found, "s": request(prefill_stats=None)})

    assert (cached_tokens(found), cached_tokens(request(prefill_stats=None))) == ((48, 16), (0, 0))
    assert list(first_slots(known, output)) == [("r", 48, 16), ("s", 0, 0)]
    assert started_requests(output) == ["r", "s", "t"]


def test_loads_that_are_out_of_date_are_computed() -> None:
    freed = []
    loads, came, again, runs = (
        request(request_id=name, status=RequestStatus.WAITING_FOR_REMOTE_KVS, num_computed_tokens=32, num_preemptions=n)
        for name, n in (("loads", 0), ("came", 0), ("again", 1), ("runs", 0))
    )
    runs.status = RequestStatus.RUNNING
    known = scheduler(
        kv_holding_waiting=[loads, came, again, runs],
        failed_recving_kv_req_ids=set(),
        finished_recving_kv_req_ids={"came", "again"},
        _update_waiting_for_remote_kv=lambda one: freed.append(one.request_id),
    )
    compute_loads_again(known)

    assert known.failed_recving_kv_req_ids == {"loads", "came", "again"}
    assert [one.num_computed_tokens for one in (loads, came, again, runs)] == [0, 0, 0, 32]
    assert freed == ["came", "again"]
    assert [one.status for one in (loads, came, again)] == [
        RequestStatus.WAITING_FOR_REMOTE_KVS,
        RequestStatus.WAITING,
        RequestStatus.PREEMPTED,
    ]
