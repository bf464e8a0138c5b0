"""vLLM's free list, read and put in another order."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.vllm.vllm_adapter.pools import Device, ids, keys
from tokencake_vllm.vllm_adapter.block_pool import (
    block_hash_of,
    find_block,
    free_list,
    move_before,
    move_to_head,
    move_to_tail,
    next_free,
)


def test_a_cached_block_is_found_by_its_hash_and_tells_it() -> None:
    device = Device()
    (block,) = device.take(keys("k", 1))

    assert find_block(device.pool, keys("k", 1)[0]) is block
    assert find_block(device.pool, b"unknown".ljust(32)) is None
    assert block_hash_of(block) == keys("k", 1)[0]
    assert block_hash_of(device.pool.blocks[9]) is None


def test_the_free_list_is_what_vllm_gives_away_in_this_order() -> None:
    device = Device(4)
    assert ids(list(free_list(device.pool))) == [1, 2, 3, 4]
    taken = device.take(keys("k", 2), free=True)
    assert ids(list(free_list(device.pool))) == [3, 4, 2, 1]
    assert ids(device.pool.get_new_blocks(4)) == [3, 4, 2, 1]
    assert list(free_list(device.pool)) == []
    assert ids(taken) == [1, 2]


def test_behind_the_last_free_block_there_is_none() -> None:
    device = Device(2)
    first, last = free_list(device.pool)

    assert (next_free(first), next_free(last)) == (last, None)
    assert next_free(device.pool.get_new_blocks(1)[0]) is None


def test_blocks_at_the_head_are_given_away_next() -> None:
    device = Device(4)
    blocks = device.pool.blocks
    move_to_head(device.pool, [blocks[3], blocks[2]])

    assert device.order == [3, 2, 1, 4]
    assert device.pool.get_num_free_blocks() == 4


def test_only_free_blocks_go_to_the_tail() -> None:
    device = Device(5)
    (held,) = device.take(keys("k", 1))
    used = device.take(keys("m", 2), free=True)
    device.take(keys("n", 2), free=True)
    assert device.order == [3, 2, 5, 4]
    move_to_tail(device.pool, [held, *used])

    assert device.order == [5, 4, 3, 2], "the end of a prefix goes before its head"
    assert held.ref_cnt == 1


@pytest.mark.parametrize(
    ("position", "moved", "order"),
    [
        (4, [1, 2], [3, 1, 2, 4, 5]),
        (1, [5, 3], [5, 3, 1, 2, 4]),
        (None, [2, 1], [3, 4, 5, 2, 1]),
        (2, [], [1, 2, 3, 4, 5]),
        (None, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ],
)
def test_blocks_are_put_before_a_free_one_or_at_the_end(
    position: int | None, moved: list[int], order: list[int]
) -> None:
    device = Device(5)
    blocks = device.pool.blocks
    move_before(device.pool, None if position is None else blocks[position], [blocks[number] for number in moved])

    assert device.order == order
    assert device.pool.get_num_free_blocks() == 5
    assert ids(device.pool.get_new_blocks(5)) == order


@given(st.permutations(range(1, 7)), st.integers(0, 5), st.integers(0, 6))
def test_no_block_is_lost_in_the_free_list_whatever_is_moved(moved: list[int], count: int, taken: int) -> None:
    device = Device(6)
    blocks, position = device.pool.blocks, moved[5]
    move_before(device.pool, blocks[position], [blocks[number] for number in moved[:count]])
    place = device.order.index(position)
    assert device.order[place - count : place] == moved[:count]
    got = ids(device.pool.get_new_blocks(taken))
    assert sorted(got + device.order) == [1, 2, 3, 4, 5, 6]
    assert device.pool.get_num_free_blocks() == 6 - taken
