"""What requests hold, need and would set free, to the block."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.vllm.vllm_adapter.pools import BLOCK_TOKENS, Device, keys
from tokencake_vllm.vllm_adapter.block_view import BlockView, _first_without


def view(device: Device) -> BlockView:
    return BlockView(device.manager, BLOCK_TOKENS)


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_border_is_found_by_bisection(count: int, held: int) -> None:
    asked: list[int] = []

    def has(place: int) -> bool:
        assert 0 <= place < count
        asked.append(place)
        return place < held

    assert _first_without(has, count) == min(count, held)
    assert len(asked) <= count.bit_length()


def test_the_null_block_belongs_to_nobody() -> None:
    assert view(Device(20)).total_blocks == 20
    assert view(Device(0)).total_blocks == 1, "nothing is divided by nothing"


def test_free_blocks_are_those_that_nobody_holds() -> None:
    device = Device(20)
    device.take(keys("k", 3))
    device.take(keys("m", 2), free=True)

    assert view(device).free_blocks == 17


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_begun_block_is_a_whole_one(tokens: int, blocks: int) -> None:
    assert view(Device()).blocks_of(tokens) == blocks


@pytest.mark.parametrize(("tokens", "held"), [(64, 3), (65, 4), (80, 4), (17, 1), (16, 0), (1, 0)])
def test_a_prefix_that_others_hold_costs_nothing_but_the_last_token_is_computed(tokens: int, held: int) -> None:
    device = Device()
    device.take(keys("k", 4))
    request = device.request("r", num_tokens=tokens, block_hashes=keys("k", 4)[: tokens // 16])

    assert view(device).held_prefix_blocks(request) == held
    assert view(device).needed_blocks(request) == -(-tokens // 16) - held
    whole = BlockView(device.manager, BLOCK_TOKENS, counts_whole_prompts=True)
    assert whole.needed_blocks(request) == -(-tokens // 16), "as published"


def test_what_is_only_cached_costs_a_block() -> None:
    device = Device()
    blocks = device.take(keys("k", 4))
    device.pool.free_blocks(blocks[2:])
    request = device.request("r", num_tokens=100, block_hashes=keys("k", 6))

    assert view(device).held_prefix_blocks(request) == 2
    assert view(device).needed_blocks(request) == 5


def test_holds_that_are_excluded_do_not_count() -> None:
    device = Device()
    first, second = device.take(keys("k", 2))
    device.pool.touch([first])
    request = device.request("r", num_tokens=100, block_hashes=keys("k", 2))

    def held(excluding: dict[int, int]) -> int:
        return view(device).held_prefix_blocks(request, excluding)

    assert held({}) == 2
    assert held({second.block_id: 1}) == 1
    assert held({first.block_id: 1}) == 2
    assert held({first.block_id: 1, second.block_id: 1}) == 1
    assert held({first.block_id: 2, second.block_id: 1}) == 0


def test_only_holds_that_are_all_given_up_set_a_block_free() -> None:
    device = Device()
    one, two = device.take(keys("k", 2))
    device.pool.touch([two])

    assert view(device).freed_if_released({one.block_id: 1, two.block_id: 1}) == 1
    assert view(device).freed_if_released({one.block_id: 1, two.block_id: 2}) == 2
    assert view(device).freed_if_released({}) == 0


def test_what_leaves_with_requests_is_free_but_what_the_waiting_one_will_hit() -> None:
    device = Device()
    shared, own = device.take(keys("k", 3)), device.take(keys("m", 2))
    device.pool.touch(shared)
    device.hold("a", [*shared, own[0]])
    device.hold("b", [*shared, own[1]])
    stranger = device.request("r", num_tokens=100)
    relative = device.request("s", num_tokens=100, block_hashes=[*keys("k", 2), *keys("x", 4)])

    assert view(device).freed_by(["a"], stranger) == 1
    assert view(device).freed_by(["a", "b"], stranger) == 5
    assert view(device).freed_by(["a", "b"], relative) == 3
    assert view(device).freed_by([], stranger) == 0


def test_blocks_of_a_request_are_its_own_up_to_where_it_shares() -> None:
    device = Device()
    shared, own = device.take(keys("k", 3)), device.take(keys("m", 2))
    device.pool.touch(shared)
    device.pool.touch(shared[:1])
    device.hold("a", [*shared, *own])

    assert view(device).allocated_blocks("a") == 5
    assert [view(device).exclusive_blocks("a", holders=holders) for holders in (1, 2, 3)] == [2, 4, 5]
    assert view(device).exclusive_blocks("a") == 2
    assert view(device).exclusive_blocks("unknown") == view(device).allocated_blocks("unknown") == 0
