"""The scheduler's side of copies: what is stored, matched, loaded, pinned and uploaded, to the block."""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.unit.vllm.vllm_adapter.pools import BLOCK_TOKENS, Device, ids, keys
from tokencake.forecast.costs import CostModel
from tokencake.time_scheduler.host_tier import HostTier
from tokencake_vllm.transfer.host_cache import HostCache


class Engine:
    """A device of 20 blocks and a host of `slots`; jobs have 4 blocks."""

    def __init__(self, slots: int = 20) -> None:
        self.device, self.tier = Device(20), HostTier(slots)
        self.counted: Counter[Any] = Counter()
        self.now = 100.0
        self.cache = HostCache(self.tier, self.device.pool, CostModel(1_000, BLOCK_TOKENS), 1, 4, lambda: self.now)
        self.cache.count = self.count

    def count(self, key: Any, by: float) -> None:
        self.counted[key] += by

    def store(self, name: str, count: int, *, is_done: bool = True, distance: float = inf) -> int:
        blocks = self.cache.on_device(keys(name, count)) or self.device.take(keys(name, count))
        found = self.cache.store(keys(name, count), blocks, self.now, lambda _: distance, 10.0)
        if is_done:
            self.finish()
        return found

    def finish(self, *, ok: bool = True) -> list[tuple[str, int]]:
        """The workers are through with everything; kind and blocks of each job."""
        jobs, _ = self.cache.transfers.drain_jobs()
        for job in jobs:
            self.cache.transfers.report(job.id, 1, 1.0, ok=ok)
        return [(job.kind, len(job.blocks)) for job in jobs]

    @property
    def free(self) -> int:
        return int(self.device.pool.get_num_free_blocks())


# --- out ----------------------------------------------------------------------------------------------


def test_a_prefix_is_stored_in_jobs_and_what_the_host_has_only_once() -> None:
    engine = Engine()
    blocks = engine.device.take(keys("k", 9))
    assert engine.cache.store(keys("k", 9), blocks, 1.0, lambda _: inf, 0.0) == 9
    jobs, _ = engine.cache.transfers.drain_jobs()
    assert [list(job.blocks) for job in jobs] == [ids(blocks)[:4], ids(blocks)[4:8], ids(blocks)[8:]]
    assert [block.ref_cnt for block in blocks] == [2] * 9
    assert engine.counted == {("kv_stores", "queued"): 1, ("kv_offloads", "stored"): 9}

    more = [*blocks, *engine.device.take(keys("m", 2))]
    assert engine.cache.store([*keys("k", 9), *keys("m", 2)], more, 2.0, lambda _: inf, 0.0) == 2
    ((job,), _) = engine.cache.transfers.drain_jobs()
    assert list(job.blocks) == ids(more)[9:]
    assert engine.cache.store(keys("k", 9), blocks, 3.0, lambda _: inf, 0.0) == 0
    assert engine.counted["kv_stores", "queued"] == 2


def test_what_is_asked_for_again_is_the_newest_on_the_host() -> None:
    engine = Engine()
    engine.store("k", 2)
    engine.now = 150.0
    engine.store("k", 2)

    assert [block.used_s for block in engine.tier.ready(keys("k", 2))] == [150.0, 150.0]


def test_a_store_evicts_only_what_is_needed_later() -> None:
    engine = Engine(slots=3)
    engine.store("old", 3)
    assert engine.store("new", 2, distance=10.0) == 0
    assert engine.store("new", 2, distance=10.1) == 2
    assert engine.counted["kv_evictions", "host"] == 2
    assert engine.counted["kv_offloads", "wasted"] == 2


def test_blocks_evicted_unread_were_spare_where_a_call_hit_them_on_the_device() -> None:
    engine = Engine(slots=3)
    engine.store("old", 3)
    engine.cache.admit("r", keys("old", 3), [], 0)
    assert engine.counted["kv_offloads", "spare"] == 0, "the call found nothing on the device"
    engine.cache.match("r", keys("old", 3), 2)
    engine.cache.admit("r", keys("old", 3), [], 0)
    engine.tier.ready(keys("old", 3))[2].was_read = True
    engine.store("new", 3)

    assert engine.counted["kv_evictions", "host"] == 3
    assert (engine.counted["kv_offloads", "spare"], engine.counted["kv_offloads", "wasted"]) == (2, 0)


@pytest.mark.parametrize(
    ("fewest", "most", "words"),
    [
        (20, 20, None),
        (19, 19, "the workers have host memory for 19 KV blocks, the scheduler counts on 20"),
        (19, 20, "the workers have host memory for 19 to 20 KV blocks, the scheduler counts on 20"),
        (20, 21, "the workers have host memory for 20 to 21 KV blocks, the scheduler counts on 20"),
        (0, 20, "a worker has no host memory for 20 KV blocks, and its log says why; `time.host_kv_gib` is 4, less"),
    ],
)
def test_workers_with_another_number_of_slots_switch_copies_off(fewest: int, most: int, words: str | None) -> None:
    engine = Engine()
    engine.cache.compare_slots(fewest, most, 4.0)

    assert engine.cache.is_off == (words is not None)
    assert (engine.cache.off_reason or "").startswith(words or "")
    assert engine.store("k", 2) == (0 if words else 2)


def test_copies_that_failed_too_often_are_off_with_a_reason() -> None:
    engine = Engine()
    assert (engine.cache.is_off, engine.cache.off_reason) == (False, None)
    for number in range(8):
        engine.store(f"k{number}", 1, is_done=False)
        engine.finish(ok=False)

    assert engine.cache.is_off
    assert engine.cache.off_reason == "8 copies in a row failed; the workers' logs say why"
    assert engine.cache.match("r", keys("k", 1), 0) == 0


def test_freed_room_is_counted_from_the_offload_until_the_blocks_are_wanted_again() -> None:
    engine = Engine()
    engine.store("k", 3)
    freed = ("kv_freed_block_seconds",)
    engine.cache.mark_offloaded("c", keys("k", 5))
    engine.now = 110.0
    assert engine.cache.unpin("c") == 0
    assert engine.counted[freed] == 3 * 10.0
    engine.now = 120.0
    engine.cache.unpin("c")
    assert engine.counted[freed] == 3 * 10.0

    engine.cache.mark_offloaded("c", keys("k", 2))
    engine.now = 125.0
    engine.cache.pin("c", engine.cache.on_device(keys("k", 1)))
    assert engine.counted[freed] == 30.0 + 2 * 5.0
    engine.cache.mark_offloaded("d", keys("unknown", 2))
    engine.now = 200.0
    engine.cache.unpin("d")
    assert engine.counted[freed] == 40.0


# --- in, for a call -----------------------------------------------------------------------------------


def test_what_the_host_has_behind_the_device_is_matched_and_loaded_into_the_calls_blocks() -> None:
    engine = Engine()
    engine.store("k", 6)
    assert engine.cache.match("r", keys("k", 8), 2) == 4
    engine.now = 130.0
    assert engine.cache.admit("r", keys("k", 8), [11, 12, 13, 14, 15, 16], 3)
    ((job,), _) = engine.cache.transfers.drain_jobs()

    assert (job.blocks, job.request, job.kind) == ((13, 14, 15), "r", "load")
    assert [block.used_s for block in engine.tier.ready(keys("k", 6))] == [100.0] * 2 + [130.0] * 3 + [100.0]
    assert [block.was_hit for block in engine.tier.ready(keys("k", 6))] == [True, True, False, False, False, False]
    assert engine.counted["kv_loads", "queued"] == 1
    assert set(engine.cache.loading) == set(keys("k", 5)[2:])


def test_a_load_from_the_head_makes_its_blocks_the_newest() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.match("r", keys("k", 3), 0)
    engine.now = 130.0
    engine.cache.admit("r", keys("k", 3), [11, 12, 13], 2)

    assert [block.used_s for block in engine.tier.ready(keys("k", 3))] == [130.0, 130.0, 100.0]


def test_nothing_to_load_is_admitted_and_more_than_was_matched_is_a_defect() -> None:
    engine = Engine()
    engine.store("k", 3)
    assert engine.cache.admit("r", keys("k", 3), [], 0)
    assert engine.cache.match("r", keys("k", 3), 0) == 3
    assert engine.cache.admit("r", keys("k", 3), [1, 2, 3], 3)
    assert engine.cache.match("s", keys("k", 3)[:2], 0) is None
    with pytest.raises(RuntimeError, match="t was promised 1 blocks and matched 0"):
        engine.cache.admit("t", keys("k", 3), [1, 2, 3], 1)


def test_a_block_that_left_the_host_since_is_not_loaded() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.match("r", keys("k", 3), 0)
    engine.cache.match("s", keys("k", 3), 0)
    engine.tier.forget(engine.tier.ready(keys("k", 3))[2:])

    assert not engine.cache.admit("r", keys("k", 3), [1, 2, 3], 3)
    assert engine.counted["kv_loads", "gone"] == 1
    assert engine.cache.admit("s", keys("k", 3), [1, 2, 3], 2)
    assert engine.counted["kv_loads", "queued"] == 1


def test_a_call_waits_while_its_prefix_is_on_its_way_and_is_counted_once() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.match("r", keys("k", 3), 0)
    engine.cache.admit("r", keys("k", 3), [1, 2, 3], 3)
    for _ in range(2):
        assert engine.cache.match("s", keys("k", 3), 0) is None
    assert engine.counted["kv_loads", "waited"] == 1
    assert engine.cache.match("t", keys("k", 3), 1) is None
    assert engine.counted["kv_loads", "waited"] == 2
    assert len(engine.cache.transfers.drain_jobs()[1]) == 1, "its copy is urgent now"
    engine.cache.transfers.report(2, 1, 1.0, ok=True)
    assert engine.cache.match("s", keys("k", 3), 0) == 3
    assert engine.cache.match("s", keys("k", 3), 3) == 0


def test_the_copy_of_the_first_block_that_a_call_waits_for_is_urgent() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.match("r", keys("k", 3), 0)
    engine.cache.admit("r", keys("k", 3), [1], 1)
    engine.cache.match("s", keys("k", 3), 1)
    engine.cache.admit("s", keys("k", 3), [1, 2, 3], 2)
    engine.cache.match("t", keys("k", 3), 0)
    jobs, urgent = engine.cache.transfers.drain_jobs()

    assert [job.id for job in jobs if job.id in urgent] == [jobs[0].id]


def test_a_call_that_ended_waits_and_matches_no_more() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.match("r", keys("k", 3), 0)
    engine.cache.forget_match("r")
    with pytest.raises(RuntimeError):
        engine.cache.admit("r", keys("k", 3), [1, 2, 3], 3)


# --- in, for nobody yet -------------------------------------------------------------------------------


def test_leading_blocks_on_the_device_are_found_and_counted() -> None:
    engine = Engine()
    blocks = engine.device.take(keys("k", 3))

    assert ids(engine.cache.on_device(keys("k", 5))) == ids(blocks)
    assert engine.cache.on_device([b"unknown".ljust(32), *keys("k", 3)]) == []
    assert engine.cache.count_on_device(keys("k", 5)) == 3
    assert engine.cache.count_on_device(keys("m", 5)) == 0


def test_pins_are_held_until_they_are_given_up() -> None:
    engine = Engine()
    blocks = engine.device.take(keys("k", 3), free=True)
    engine.cache.pin("c", blocks[:2])
    engine.cache.pin("c", blocks[2:])
    engine.cache.pin("d", blocks[:1])
    engine.cache.pin("e", [])
    assert (engine.cache.pinned_blocks, engine.free, set(engine.cache.pinned)) == (4, 17, {"c", "d"})
    assert engine.cache.unpin("c") == 3
    assert (engine.cache.pinned_blocks, engine.free) == (1, 19)
    assert engine.cache.unpin("unknown") == 0
    assert engine.device.order[-2:] == [3, 2], "the end of the chain goes first"


def test_an_upload_fills_new_blocks_that_become_hits_when_it_is_over() -> None:
    engine = Engine()
    engine.store("k", 6)
    engine.device.pool.free_blocks(engine.device.pool.blocks[1:7])
    engine.device.pool.reset_prefix_cache()
    told: list[bool] = []
    assert engine.cache.upload("c", keys("k", 6), 2, 3, told.append) == 3
    assert engine.cache.is_busy
    assert engine.cache.holds_blocks
    assert (engine.free, engine.cache.on_device(keys("k", 6)[2:]), engine.cache.pinned_blocks) == (17, [], 0)
    assert engine.finish() == [("load", 3)]

    assert told == [True]
    assert len(engine.cache.on_device(keys("k", 6)[2:])) == 3
    assert (engine.cache.pinned_blocks, engine.cache.is_busy, engine.cache.holds_blocks) == (3, False, False)
    assert engine.cache.unpin("c") == 3
    assert engine.free == 20


def test_an_upload_that_fails_gives_its_blocks_back() -> None:
    engine = Engine()
    engine.store("k", 3)
    told: list[bool] = []
    engine.cache.upload("c", keys("k", 3), 0, 3, told.append)
    assert engine.free == 20 - 3 - 3
    engine.finish(ok=False)

    assert (told, engine.free, engine.cache.pinned_blocks) == ([False], 17, 0)


def test_nothing_is_uploaded_that_is_not_there_on_its_way_or_after_copies_are_off() -> None:
    engine = Engine()
    engine.store("k", 3)

    def upload(first: int = 0) -> int:
        return engine.cache.upload("c", keys("k", 3), first, 9, lambda _: None)

    assert upload(3) == 0
    assert upload() == 3
    assert upload() == 0
    assert upload(1) == 0
    engine.finish()
    engine.cache.compare_slots(1, 1, 1.0)
    assert upload() == 0
    assert engine.free == 20 - 3 - 3


def test_room_that_an_upload_takes_again_is_no_longer_counted_as_freed() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.mark_offloaded("c", keys("k", 3))
    engine.now = 104.0
    engine.cache.upload("c", keys("k", 3), 0, 3, lambda _: None)

    assert engine.counted["kv_freed_block_seconds",] == 12.0


def test_the_tokens_of_an_uploaded_block_are_those_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    engine.store("k", 4)
    published: list[int] = []

    def publish(_pool: Any, _block: Any, _key: bytes, num_tokens: int) -> None:
        published.append(num_tokens)

    monkeypatch.setattr("tokencake_vllm.transfer.host_cache.publish_block", publish)
    engine.cache.upload("c", keys("k", 4), 2, 2, lambda _: None)
    engine.finish()

    assert published == [3 * BLOCK_TOKENS, 4 * BLOCK_TOKENS]


# --- all of it ----------------------------------------------------------------------------------------


def test_a_wipe_overwrites_all_that_is_free() -> None:
    engine = Engine()
    engine.device.take(keys("k", 5))
    assert engine.cache.wipe() == 15
    assert engine.free == 0
    assert engine.cache.wipe() == 0
    assert engine.finish() == [("wipe", 15)]
    assert engine.free == 15


def test_a_reset_gives_everything_back() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.pin("c", engine.cache.on_device(keys("k", 3)))
    engine.cache.mark_offloaded("d", keys("k", 3))
    engine.now = 900.0
    engine.cache.reset()

    assert (engine.cache.pinned, len(engine.tier), engine.counted["kv_freed_block_seconds",]) == ({}, 0, 0)
    engine.cache.unpin("d")
    assert engine.counted["kv_freed_block_seconds",] == 0


def test_blocks_of_copies_can_be_counted_as_free() -> None:
    engine = Engine()
    engine.store("k", 3)
    engine.cache.upload("c", keys("k", 3), 0, 3, lambda _: None)
    with engine.cache.counted_as_free():
        assert engine.free == 17
    assert engine.free == 14
