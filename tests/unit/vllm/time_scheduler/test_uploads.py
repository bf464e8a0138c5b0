"""Which uploads start, where they find room, and what came of them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.unit.vllm.vllm_adapter.pools import BLOCK_TOKENS, Device, keys
from tokencake.forecast.costs import CostModel
from tokencake.protocol import Hint
from tokencake.time_scheduler.dropped import Dropped
from tokencake.time_scheduler.host_tier import HostTier
from tokencake.time_scheduler.prefixes import PrefixIndex
from tokencake_vllm.time_scheduler.free_queue import FreeQueue
from tokencake_vllm.time_scheduler.uploads import PER_STEP, QUEUE_SCAN, RETRY_STEPS, Uploads
from tokencake_vllm.transfer.host_cache import HostCache
from tokencake_vllm.vllm_adapter.block_view import BlockView


class Engine:
    """A device of `count` blocks, jobs of 4 blocks, and uploads of stalled chains that are on the host."""

    def __init__(self, count: int = 40) -> None:
        self.device, self.prefixes = Device(count), PrefixIndex()
        self.cache = HostCache(HostTier(200), self.device.pool, CostModel(1, BLOCK_TOKENS), 1, 4, lambda: 0.0)
        self.scheduler: Any = SimpleNamespace(
            kv_cache_manager=self.device.manager,
            max_num_running_reqs=2,
            max_num_scheduled_tokens=32,
            block_size=16,
            waiting=[],
            running=[],
        )
        self.counted: Counter[tuple[str, ...]] = Counter()
        self.worthless: set[str] = set()
        queue = FreeQueue(self.scheduler, self.cache, self.prefixes, Dropped(9, lambda *_: None))
        view = BlockView(self.device.manager, BLOCK_TOKENS)
        self.uploads = Uploads(
            self.scheduler,
            view,
            self.cache,
            self.prefixes,
            queue,
            lambda prefix: prefix.id not in self.worthless,
            self.count,
        )

    def count(self, *key: str, by: float = 1) -> None:
        self.counted[key[1:]] += int(by)

    def stalled(self, name: str, count: int, *, on_device: int = 0) -> Any:
        self.prefixes.arrive(name, keys(name, 1), Hint(session=name), 0.0)
        prefix = self.prefixes.stall(name, keys(name, count), 0.0)
        assert prefix is not None
        prefix.back_s = 10.0
        tier = self.cache.tier
        tier.settle(tier.reserve(keys(name, count), 0.0, lambda _: 0.0), ok=True)
        self.device.take(keys(name, on_device), free=True)
        self.uploads.add_due(name)
        return prefix

    def wait(self, *tokens: int) -> None:
        self.scheduler.waiting = [SimpleNamespace(num_tokens=count, block_hashes=[]) for count in tokens]

    def start(self, step: int = 1) -> list[int]:
        """Blocks of each job that was started."""
        self.uploads.start(step, 0.0)
        self.jobs = self.cache.transfers.drain_jobs()[0]
        return [len(job.blocks) for job in self.jobs]

    def finish(self, *, ok: bool = True) -> None:
        for job in self.jobs:
            self.cache.transfers.report(job.id, 1, 1.0, ok=ok)


@pytest.mark.parametrize(("count", "jobs"), [(1, [1]), (4, [4]), (5, [3]), (6, [3]), (9, [5])])
def test_more_than_a_job_is_brought_by_halves(count: int, jobs: list[int]) -> None:
    engine = Engine()
    engine.stalled("c", count)

    assert engine.start() == jobs
    assert (len(engine.uploads), engine.uploads.has_uploaded("c")) == (0, True)
    assert engine.counted == {("started",): 1}


def test_a_piece_that_has_landed_makes_the_next_one_due_until_all_is_there() -> None:
    engine = Engine()
    prefix = engine.stalled("c", 9)
    started = []
    for step in range(1, 5):
        started += engine.start(step)
        engine.finish()
    assert started == [5, 4]
    assert engine.cache.count_on_device(prefix.block_hashes) == 9
    assert engine.counted == {("started",): 1}
    assert (prefix.is_uploaded, len(engine.uploads), engine.cache.pinned_blocks) == (True, 0, 0)
    assert engine.uploads.resolve("c", 9) == 9


def test_what_is_on_the_device_is_not_brought_and_not_displaced_meanwhile() -> None:
    engine = Engine()
    engine.stalled("c", 6, on_device=2)
    assert engine.start() == [4]
    assert engine.cache.pinned_blocks == 2
    engine.finish()
    assert engine.cache.pinned_blocks == 0
    assert engine.uploads.resolve("c", 6) == 4, "two were there before"


@pytest.mark.parametrize(
    ("hit", "gained", "outcome"),
    [
        (6, 4, "used"),
        (5, 3, "used"),
        (3, 1, "used"),
        (2, 0, "wasted"),
        (0, 0, "wasted"),
        (9, 4, "used"),
        (None, 0, "wasted"),
    ],
)
def test_an_upload_was_of_use_for_the_blocks_of_it_that_were_hit(hit: int | None, gained: int, outcome: str) -> None:
    engine = Engine()
    engine.stalled("c", 6, on_device=2)
    engine.start()
    engine.finish()

    assert engine.uploads.resolve("c", hit) == gained
    assert engine.counted == {("started",): 1, (outcome,): 1}
    assert engine.uploads.resolve("c", hit) == 0
    assert not engine.uploads.has_uploaded("c")


def test_an_upload_is_late_while_its_blocks_are_on_their_way() -> None:
    engine = Engine()
    prefix, other = engine.stalled("c", 4), engine.stalled("d", 4)
    engine.uploads.cancel("d")
    assert not engine.uploads.is_late(prefix)
    engine.start()
    assert (engine.uploads.is_late(prefix), engine.uploads.is_late(other)) == (True, False)
    engine.finish()
    assert not engine.uploads.is_late(prefix)


def test_blocks_before_an_upload_that_are_on_their_way_make_it_not_late() -> None:
    engine = Engine()
    prefix = engine.stalled("c", 6, on_device=2)
    engine.start()
    engine.finish()
    engine.cache.loading[prefix.block_hashes[1]] = 1
    assert not engine.uploads.is_late(prefix)
    engine.cache.loading[prefix.block_hashes[2]] = 1
    assert engine.uploads.is_late(prefix)


def test_an_upload_that_fails_is_counted_and_tried_no_more() -> None:
    engine = Engine()
    engine.stalled("c", 4)
    engine.start()
    engine.finish(ok=False)

    assert engine.counted == {("started",): 1, ("failed",): 1}
    assert (engine.uploads.has_uploaded("c"), len(engine.uploads), engine.cache.pinned_blocks) == (False, 0, 0)


def test_a_prefix_that_is_gone_when_its_upload_lands_is_not_due_again() -> None:
    engine = Engine()
    engine.stalled("c", 9)
    engine.start()
    engine.prefixes.remove("c")
    engine.finish()

    assert (len(engine.uploads), engine.cache.pinned_blocks) == (0, 0)


def test_a_bounded_number_of_uploads_starts_in_a_step() -> None:
    engine = Engine(100)
    for number in range(PER_STEP + 2):
        engine.stalled(f"c{number}", 4)

    assert engine.start() == [4] * PER_STEP
    assert engine.start() == [4] * 2


def test_what_is_gone_complete_or_of_no_worth_is_not_started() -> None:
    engine = Engine()
    for name in ("gone", "complete", "worthless", "there"):
        engine.stalled(name, 4, on_device=4 * (name == "there"))
    engine.prefixes.remove("gone")
    engine.prefixes.by_id["complete"].is_uploaded = True
    engine.worthless.add("worthless")

    assert engine.start() == []
    assert (len(engine.uploads), engine.counted) == (0, {})
    assert not engine.prefixes.by_id["there"].is_uploaded, "nothing was uploaded of it"


def test_what_is_on_the_device_already_is_the_newest_there() -> None:
    engine = Engine()
    engine.stalled("there", 2, on_device=2)
    engine.device.take(keys("later", 2), free=True)
    there = engine.cache.on_device(keys("there", 2))
    engine.start()

    assert engine.device.order[-2:] == [block.block_id for block in reversed(there)]


def test_what_was_brought_and_displaced_is_not_brought_again() -> None:
    engine = Engine()
    prefix = engine.stalled("c", 9)
    engine.start()
    engine.finish()
    taken = engine.device.pool.get_new_blocks(40)
    engine.device.pool.free_blocks(taken)

    assert engine.start(2) == []
    assert (prefix.is_uploaded, len(engine.uploads)) == (True, 0)


def test_an_upload_that_has_begun_goes_on_though_it_would_not_be_begun() -> None:
    engine = Engine()
    engine.stalled("c", 9)
    engine.start()
    engine.finish()
    engine.worthless.add("c")

    assert engine.start(2) == [4]


@pytest.mark.parametrize(
    ("waiting", "running", "jobs"),
    [(0, 0, [4]), (16 * 6, 0, [4]), (16 * 7, 0, []), (16 * 2, 2, [4]), (16 * 3, 2, []), (16 * 99, 0, [])],
)
def test_room_is_what_is_free_beyond_what_waits_and_what_grows(waiting: int, running: int, jobs: list[int]) -> None:
    engine = Engine(10)
    engine.stalled("c", 4)
    engine.wait(waiting)
    engine.scheduler.running = [None] * running

    assert engine.start() == jobs


def test_a_bounded_number_of_waiting_calls_counts() -> None:
    engine = Engine(QUEUE_SCAN + 4)
    engine.stalled("c", 4)
    engine.wait(*[16] * (QUEUE_SCAN + 1))
    assert engine.start() == [4]
    engine = Engine(QUEUE_SCAN + 3)
    engine.stalled("c", 4)
    engine.wait(*[16] * (QUEUE_SCAN + 1))
    assert engine.start() == []


def test_what_running_calls_hold_of_a_waiting_one_is_not_needed_again() -> None:
    engine = Engine(14)
    engine.stalled("c", 4)
    engine.device.take(keys("held", 4))
    engine.wait(16 * 10)
    assert engine.start() == []
    engine.scheduler.waiting[0].block_hashes = keys("held", 4)
    assert engine.start(9) == [4]


def test_two_uploads_share_the_room() -> None:
    engine = Engine(7)
    engine.stalled("c", 4)
    engine.stalled("d", 4)
    assert engine.start() == [4]
    engine.finish()
    assert engine.counted["no_room",] == 1


def test_a_long_piece_is_brought_in_part_if_a_job_fits() -> None:
    engine = Engine(30)
    engine.stalled("c", 16)
    engine.wait(16 * 25)
    assert engine.start() == [5]
    engine = Engine(30)
    engine.stalled("c", 16)
    engine.wait(16 * 27)
    assert engine.start() == [], "three are less than a job"


def test_where_there_is_no_room_the_prefix_is_tried_again_after_some_steps_and_counted_once() -> None:
    engine = Engine(10)
    engine.stalled("c", 4)
    engine.wait(160)
    assert engine.start(7) == []
    assert engine.counted == {("no_room",): 1}
    assert engine.start(7 + RETRY_STEPS) == []
    assert engine.counted == {("no_room",): 1}
    engine.wait()
    assert engine.start(7 + 2 * RETRY_STEPS - 1) == []
    assert engine.start(7 + 2 * RETRY_STEPS) == [4]


def test_a_prefix_that_finds_no_room_lets_none_behind_it_start() -> None:
    engine = Engine(10)
    engine.stalled("c", 4)
    engine.stalled("d", 1)
    engine.wait(16 * 8)

    assert engine.start() == []
    assert engine.start(2) == [1], "a step later it is that one's turn"


def test_a_prefix_that_is_due_twice_keeps_its_turn() -> None:
    engine = Engine(10)
    engine.stalled("c", 4)
    engine.wait(160)
    engine.start(7)
    engine.uploads.add_due("c")
    engine.wait()

    assert (len(engine.uploads), engine.start(8)) == (1, [])
    engine.uploads.reset()
    assert len(engine.uploads) == 0


def test_a_device_is_idle_where_half_is_free_and_nobody_waits_or_is_on_its_way() -> None:
    engine = Engine(19)  # of 20 with the null block
    engine.device.take(keys("x", 9))
    assert engine.uploads.is_idle()
    engine.wait(1)
    assert not engine.uploads.is_idle()
    engine.wait()
    engine.cache.loading[b"k"] = 1
    assert not engine.uploads.is_idle()
    engine.cache.loading.clear()
    engine.uploads.add_due("c")
    assert not engine.uploads.is_idle()
    engine.uploads.cancel("c")
    engine.device.take(keys("y", 1))
    assert not engine.uploads.is_idle()
