"""Copies under way: what they hold, when they are over, and what is left of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.unit.vllm.vllm_adapter.pools import BLOCK_TOKENS, Device, ids, keys
from tokencake.forecast.costs import CostModel
from tokencake.time_scheduler.host_tier import HostBlock, HostTier
from tokencake_vllm.transfer.in_flight import MAX_FAILURES, InFlightTransfers


class Engine:
    """A device of 20 blocks, a host of 20, and the copies between them."""

    def __init__(self, world_size: int = 1) -> None:
        self.device, self.tier = Device(20), HostTier(20)
        self.counted: Counter[Any] = Counter()
        self.costs = CostModel(1_000, BLOCK_TOKENS)
        self.copies = InFlightTransfers(self.tier, self.device.pool, self.costs, world_size, self.count)

    def count(self, key: Any, by: float) -> None:
        self.counted[key] += by

    def on_host(self, name: str, count: int) -> list[HostBlock]:
        blocks = self.tier.reserve(keys(name, count), 0.0, lambda _: 0.0)
        self.tier.settle(blocks, ok=True)
        return blocks

    def store(self, name: str, count: int) -> tuple[list[HostBlock], Any]:
        host = self.tier.reserve(keys(name, count), 0.0, lambda _: 0.0)
        device = self.device.take(keys(name, count))
        self.copies.begin("store", host, device)
        return host, device

    def load(self, host: list[HostBlock], **given: Any) -> Any:
        device = self.device.pool.get_new_blocks(len(host))
        self.copies.begin("load", host, device, **given)
        return device

    @property
    def free(self) -> int:
        return int(self.device.pool.get_num_free_blocks())


def test_jobs_are_numbered_and_handed_out_once() -> None:
    engine = Engine()
    host, device = engine.store("k", 2)
    engine.store("m", 1)
    jobs, urgent = engine.copies.drain_jobs()

    assert [job.id for job in jobs] == [1, 2]
    assert (jobs[0].kind, jobs[0].request, urgent) == ("store", None, ())
    assert (list(jobs[0].blocks), list(jobs[0].slots)) == (ids(device), [block.slot for block in host])
    assert engine.copies.drain_jobs() == ([], ())
    assert len(engine.copies) == 2


def test_a_load_that_a_call_waits_for_goes_into_the_calls_own_blocks() -> None:
    engine = Engine()
    host = engine.on_host("k", 2)
    engine.copies.begin("load", host, [], request="r", device_ids=[7, 9])
    ((job,), _) = engine.copies.drain_jobs()

    assert (job.blocks, job.request) == ((7, 9), "r")
    assert (list(engine.copies.held_blocks()), [block.pins for block in host]) == ([], [1, 1])
    assert engine.copies.loading == dict.fromkeys(keys("k", 2), 1)


def test_what_copies_hold_and_which_of_it_goes_out_is_known() -> None:
    engine = Engine()
    _, out = engine.store("k", 2)
    engine.device.pool.touch(out[:1])
    engine.copies.begin("store", [], out[:1])
    into = engine.load(engine.on_host("m", 3))

    assert ids(list(engine.copies.held_blocks())) == ids([*out, out[0], *into])
    assert engine.copies.storing() == {out[0].block_id: 2, out[1].block_id: 1}


def test_a_copy_is_over_when_all_ranks_have_told_with_the_longest_time_and_all_must_be_well() -> None:
    engine = Engine(world_size=4)
    engine.store("k", 2)
    engine.copies.report(1, 1, 0.5, ok=True)
    engine.copies.report(1, 2, 4.0, ok=True)
    assert len(engine.copies) == 1
    engine.copies.report(1, 1, 1.0, ok=True)
    assert (len(engine.copies), engine.tier.loadable(keys("k", 2))) == (0, 2)
    assert engine.costs.to_host.seconds == pytest.approx(0.5 * 1_000 / 12e9 + 0.5 * 4.0 / 2)
    engine.copies.report(1, 1, 1.0, ok=True)

    engine.store("m", 2)
    for ok in (True, False, True, True):
        engine.copies.report(2, 1, 1.0, ok=ok)
    assert engine.tier.known(keys("m", 2)) == 0


def test_a_store_teaches_the_way_out_and_gives_its_blocks_back() -> None:
    engine = Engine()
    engine.store("k", 3)
    assert engine.free == 17
    engine.copies.report(1, 1, 6.0, ok=True)

    assert engine.free == 20
    assert engine.counted == {("kv_copied_bytes", "store"): 3_000, ("kv_copy_seconds", "store"): 6.0}
    assert engine.costs.to_device.seconds == 1_000 / 12e9
    assert engine.costs.to_host.seconds > 0.9


def test_a_load_teaches_the_way_in_and_its_blocks_were_used_once() -> None:
    engine = Engine()
    host = engine.on_host("k", 3)
    for number in (1, 2):
        engine.load(host)
        assert [block.pins for block in host] == [1] * 3
        engine.copies.report(number, 1, 3.0, ok=True)
        assert (engine.free, [block.pins for block in host]) == (20, [0] * 3)

    assert engine.counted["kv_offloads", "used"] == 3
    assert engine.counted["kv_copied_bytes", "load"] == 6_000
    assert engine.costs.to_host.seconds == 1_000 / 12e9
    assert engine.costs.to_device.seconds > 0.7
    assert engine.copies.loading == {}


def test_a_wipe_teaches_nothing() -> None:
    engine = Engine()
    engine.copies.begin("wipe", [], engine.device.pool.get_new_blocks(4))
    engine.copies.report(1, 1, 9.0, ok=True)

    assert (engine.counted, engine.free) == ({}, 20)
    assert engine.costs.to_device.seconds == engine.costs.to_host.seconds == 1_000 / 12e9


def test_a_block_is_on_its_way_until_the_last_copy_of_it_is_over() -> None:
    engine = Engine()
    host = engine.on_host("k", 2)
    engine.load(host)
    engine.load(host[:1])
    engine.copies.report(1, 1, 1.0, ok=True)

    assert engine.copies.loading == {keys("k", 1)[0]: 1}


def test_what_a_load_did_not_bring_is_forgotten_and_its_blocks_are_free() -> None:
    engine = Engine()
    host = engine.on_host("k", 4)
    engine.load(host[2:])
    engine.copies.report(1, 1, 1.0, ok=False)

    assert (engine.tier.known(keys("k", 4)), engine.free, engine.copies.loading) == (2, 20, {})
    assert engine.counted == {("kv_copy_failures", "load"): 1}


def test_who_wants_to_know_gets_the_blocks_of_a_load() -> None:
    engine = Engine()
    told: list[bool] = []
    host = engine.on_host("k", 2)
    for ok in (True, False):
        engine.load(host, then=told.append)
        engine.copies.report(1 + (not ok), 1, 1.0, ok=ok)

    assert (told, engine.free) == ([True, False], 16)


def test_copies_that_fail_in_a_row_are_no_longer_tried_and_one_that_does_not_ends_the_row() -> None:
    engine = Engine()

    def finish(number: int, *, ok: bool) -> None:
        engine.store("k", 1)
        engine.copies.report(number, 1, 1.0, ok=ok)
        if ok:
            engine.tier.reset()

    for number in range(1, MAX_FAILURES):
        finish(number, ok=False)
    assert not engine.copies.is_broken
    finish(MAX_FAILURES, ok=True)
    for number in range(1, MAX_FAILURES):
        finish(MAX_FAILURES + number, ok=False)
    assert not engine.copies.is_broken
    finish(2 * MAX_FAILURES, ok=False)
    assert engine.copies.is_broken
    assert engine.counted["kv_copy_failures", "store"] == 2 * MAX_FAILURES - 1


def test_the_loads_of_a_block_that_a_call_waits_for_are_urgent_until_they_are_over() -> None:
    engine = Engine()
    engine.store("s", 1)
    host = engine.on_host("k", 2)
    engine.load(host[:1])
    engine.load(host[1:])
    engine.copies.expedite(keys("k", 2)[1])
    engine.copies.expedite(keys("s", 1)[0])

    assert engine.copies.drain_jobs()[1] == (3,)
    engine.copies.report(3, 1, 1.0, ok=True)
    assert engine.copies.drain_jobs()[1] == ()


def test_a_reset_takes_back_what_no_worker_has_and_makes_void_what_they_write() -> None:
    engine = Engine()
    stored, _ = engine.store("out", 2)
    engine.load(engine.on_host("in", 3))
    engine.copies.drain_jobs()
    told: list[bool] = []
    engine.load(engine.on_host("queued", 2), then=told.append)
    engine.copies.begin("load", engine.on_host("own", 1), [], request="r", device_ids=[5])
    assert engine.free == 20 - 2 - 3 - 2
    engine.copies.reset()

    assert told == [False]
    assert [job.request for job in engine.copies.drain_jobs()[0]] == ["r"], "its call is told when it fails"
    assert engine.free == 20 - 3 - 2, "a store reads what may be overwritten; a load goes on writing"
    assert engine.copies.storing() == {}
    engine.copies.report(1, 1, 1.0, ok=True)
    engine.copies.report(2, 1, 1.0, ok=False)
    assert not any(block.is_ready for block in stored)
    assert engine.counted["kv_copy_failures", "load"] == 0, "what is void did not fail"
    assert engine.free == 18


def test_meanwhile_blocks_that_only_copies_hold_count_as_free() -> None:
    engine = Engine()
    into = engine.load(engine.on_host("k", 3))
    with engine.copies.counted_as_free():
        assert engine.free == 20
    assert engine.free == 17
    assert [block.ref_cnt for block in into] == [1] * 3
    with pytest.raises(ZeroDivisionError), engine.copies.counted_as_free():
        raise ZeroDivisionError
    assert engine.free == 17
