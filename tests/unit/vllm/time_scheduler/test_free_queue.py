"""Which free blocks are given away first, and which may be taken for an upload."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.unit.vllm.vllm_adapter.pools import BLOCK_TOKENS, Device, ids, keys
from tokencake.forecast.costs import CostModel
from tokencake.forecast.roles import Role
from tokencake.protocol import Hint
from tokencake.time_scheduler.dropped import Dropped
from tokencake.time_scheduler.host_tier import HostTier
from tokencake.time_scheduler.prefixes import PrefixIndex
from tokencake_vllm.time_scheduler import free_queue
from tokencake_vllm.time_scheduler.free_queue import FreeQueue
from tokencake_vllm.transfer.host_cache import HostCache


class Engine:
    """A device of `count` blocks of which a step takes up to 2 + 32 // 16 = 4."""

    def __init__(self, count: int = 20) -> None:
        self.device = Device(count)
        self.prefixes, self.dropped = PrefixIndex(), Dropped(100, lambda *_: None)
        self.cache = HostCache(HostTier(50), self.device.pool, CostModel(1, BLOCK_TOKENS), 1, 4, lambda: 0.0)
        scheduler: Any = SimpleNamespace(
            kv_cache_manager=self.device.manager, max_num_running_reqs=2, max_num_scheduled_tokens=32, block_size=16
        )
        self.queue = FreeQueue(scheduler, self.cache, self.prefixes, self.dropped)

    def use_up(self, leave: int = 0) -> None:
        """All empty blocks are taken, but so many."""
        empty = sum(block.block_hash is None for block in self.device.pool.free_block_queue.get_all_free_blocks())
        self.device.pool.get_new_blocks(empty - leave)

    def drop(self, name: str, count: int) -> None:
        """A prefix that is on the device is dropped, its end first."""
        self.dropped.add(Role(), "final", name, keys(name, count)[::-1])

    def stalled(self, name: str, count: int, back_s: float, *, on_host: int | None = None) -> Any:
        """A stalled chain whose blocks are cached."""
        self.prefixes.arrive(name, keys(name, 1), Hint(session=name), 0.0)
        prefix = self.prefixes.stall(name, keys(name, count), 0.0)
        assert prefix is not None
        prefix.back_s = back_s
        tier = self.cache.tier
        stored = count if on_host is None else on_host
        tier.settle(tier.reserve(keys(name, stored), 0.0, lambda _: 0.0), ok=True)
        return prefix


# --- dropped blocks -----------------------------------------------------------------------------------


def test_dropped_blocks_are_given_away_behind_the_empty_ones_and_before_all_others() -> None:
    engine = Engine(8)
    old, dropped = engine.device.take(keys("old", 2), free=True), engine.device.take(keys("d", 2), free=True)
    engine.use_up(leave=2)
    empty = engine.device.order[:2]
    engine.drop("d", 2)
    engine.queue.put_dropped_first()

    assert engine.device.order == [*empty, *ids(dropped)[::-1], *ids(old)[::-1]]
    assert len(engine.dropped) == 0
    engine.queue.put_dropped_first()
    assert engine.device.order == [*empty, *ids(dropped)[::-1], *ids(old)[::-1]]


def test_no_more_are_put_first_than_a_step_takes() -> None:
    engine = Engine(20)
    engine.device.take(keys("old", 2), free=True)
    dropped = engine.device.take(keys("d", 6), free=True)
    engine.use_up()
    engine.drop("d", 6)
    engine.queue.put_dropped_first()
    assert engine.device.order[:4] == ids(dropped)[:1:-1]
    assert len(engine.dropped) == 2
    engine.queue.put_dropped_first()
    assert len(engine.dropped) == 2, "four stand first already"

    engine.device.pool.get_new_blocks(1)
    engine.queue.put_dropped_first()
    assert len(engine.dropped) == 1
    assert engine.device.order[:4] == ids(dropped)[4:0:-1]


def test_empty_blocks_count_among_those_that_a_step_takes() -> None:
    engine = Engine(20)
    engine.device.take(keys("old", 2), free=True)
    engine.device.take(keys("d", 6), free=True)
    engine.use_up(leave=3)
    engine.drop("d", 6)
    engine.queue.put_dropped_first()

    assert len(engine.dropped) == 5


def test_what_is_wanted_gone_or_held_is_not_put_first() -> None:
    engine = Engine(20)
    engine.device.take(keys("old", 1), free=True)
    wanted, held = engine.device.take(keys("w", 1), free=True), engine.device.take(keys("h", 1))
    engine.use_up()
    engine.stalled("w", 1, 9.0)
    for name in ("w", "h", "gone"):
        engine.drop(name, 1)
    before = engine.device.order
    engine.queue.put_dropped_first()
    assert engine.device.order == before
    assert not engine.dropped.is_first(keys("w", 1)[0])
    assert len(engine.dropped) == 1, "what is held is looked at again"

    engine.device.pool.free_blocks(held)
    engine.queue.put_dropped_first()
    assert engine.device.order[0] == ids(held)[0]
    assert ids(wanted)[0] in engine.device.order[1:]


def test_dropped_blocks_that_stand_at_the_head_already_stay_there() -> None:
    engine = Engine(6)
    dropped = engine.device.take(keys("d", 3), free=True)
    others = engine.device.take(keys("o", 2), free=True)
    engine.use_up()
    engine.drop("d", 3)
    engine.queue.put_dropped_first()
    assert engine.device.order == [*ids(dropped)[::-1], *ids(others)[::-1]]


def test_where_all_free_blocks_are_dropped_or_empty_they_stand_at_the_end() -> None:
    engine = Engine(3)
    dropped = engine.device.take(keys("d", 2), free=True)
    engine.drop("d", 2)
    engine.queue.put_dropped_first()

    assert engine.device.order == [3, *ids(dropped)[::-1]]
    assert sorted(ids(engine.device.pool.get_new_blocks(3))) == [1, 2, 3]


def test_blocks_that_are_used_again_go_last() -> None:
    engine = Engine(4)
    first, _ = engine.device.take(keys("a", 1), free=True), engine.device.take(keys("b", 1), free=True)
    engine.use_up()
    engine.queue.renew([keys("a", 1)[0], b"unknown".ljust(32)])

    assert engine.device.order[-1] == ids(first)[0]


# --- what an upload may take --------------------------------------------------------------------------


def test_empty_blocks_and_such_as_nobody_wants_are_taken_first_and_no_more_than_asked_for() -> None:
    engine = Engine(6)
    nobodys, wanted = engine.device.take(keys("n", 2), free=True), engine.device.take(keys("w", 2), free=True)
    engine.stalled("w", 2, back_s=1_000.0)
    mine = engine.stalled("mine", 6, back_s=10.0)

    def found(count: int) -> list[int]:
        return ids(engine.queue.reclaimable(mine, count, 0.0))

    assert found(0) == []
    assert found(3) == [5, 6, ids(nobodys)[1]]
    assert found(4) == [5, 6, *ids(nobodys)[::-1]]
    assert found(5) == [5, 6, *ids(nobodys)[::-1], wanted[1].block_id]
    assert found(9) == [5, 6, *ids(nobodys)[::-1], *ids(wanted)[::-1]]


@pytest.mark.parametrize(("back_s", "gives"), [(21.0, False), (21.1, True), (5.0, False)])
def test_a_prefix_gives_to_one_that_is_needed_in_less_than_half_the_time_less_a_second(
    back_s: float, gives: bool
) -> None:
    engine = Engine(4)
    later = engine.device.take(keys("later", 2), free=True)
    engine.use_up()
    engine.stalled("later", 2, back_s)
    mine = engine.stalled("mine", 6, back_s=10.0)

    assert ids(engine.queue.reclaimable(mine, 9, 0.0)) == (ids(later)[::-1] if gives else [])


def test_those_needed_last_give_first_and_a_bounded_number_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_queue, "_MAX_SOURCES", 2)
    engine = Engine(4)
    blocks = {name: engine.device.take(keys(name, 1), free=True) for name in ("b", "c", "a")}
    engine.use_up()
    for name, back_s in (("a", 100.0), ("b", 300.0), ("c", 200.0)):
        engine.stalled(name, 1, back_s)
    mine = engine.stalled("mine", 6, back_s=10.0)

    assert ids(engine.queue.reclaimable(mine, 9, 0.0)) == [*ids(blocks["b"]), *ids(blocks["c"])]


def test_a_running_prefix_and_what_is_not_on_the_host_or_held_gives_nothing() -> None:
    engine = Engine(8)
    later = engine.device.take(keys("later", 4), free=True)
    runs = engine.device.take(keys("runs", 1), free=True)
    engine.use_up()
    engine.stalled("later", 4, 500.0, on_host=3)
    engine.stalled("runs", 1, 500.0)
    engine.prefixes.by_id["runs"].phase = "running"
    mine = engine.stalled("mine", 6, back_s=10.0)
    engine.device.pool.touch(later[1:2])

    assert ids(engine.queue.reclaimable(mine, 9, 0.0)) == [later[2].block_id, later[0].block_id]
    assert runs[0].ref_cnt == 0


def test_what_another_prefix_wants_too_and_all_before_it_stays() -> None:
    engine = Engine(8)
    later = engine.device.take(keys("later", 4), free=True)
    engine.use_up()
    engine.stalled("later", 4, 500.0)
    engine.prefixes.arrive("sharer", keys("later", 2), None, 0.0)
    mine = engine.stalled("mine", 6, back_s=10.0)

    assert ids(engine.queue.reclaimable(mine, 9, 0.0)) == ids(later)[:1:-1]


def test_a_bounded_number_of_free_blocks_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_queue, "_FREE_SCAN", 3)
    engine = Engine(6)

    assert len(engine.queue.reclaimable(engine.stalled("mine", 6, back_s=10.0), 9, 0.0)) == 3
