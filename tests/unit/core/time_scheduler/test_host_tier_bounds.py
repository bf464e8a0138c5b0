"""What the host evicts, pins, hits and forgets, to the block."""

from __future__ import annotations

from math import inf

import pytest

from tokencake.time_scheduler.host_tier import HostBlock, HostTier, leading


def prefix(name: str, length: int) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(length)]


def far(block: HostBlock) -> float:
    return inf


def stored(tier: HostTier, keys: list[bytes], now_s: float = 0.0) -> list[HostBlock]:
    blocks = tier.reserve(keys, now_s, far)
    tier.settle(blocks, ok=True)
    return blocks


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_leading_blocks_are_counted_up_to_the_first_that_is_not_here(count: int) -> None:
    keys = prefix("k", 5)

    assert leading(keys, set(keys[:count]).__contains__) == count


def test_ready_blocks_lead_up_to_the_first_that_is_not() -> None:
    tier = HostTier(10)
    blocks = tier.reserve(prefix("k", 4), 0.0, far)
    assert tier.loadable(prefix("k", 4)) == 0
    tier.settle(blocks[:2], ok=True)

    assert [block.key for block in tier.ready(prefix("k", 4))] == prefix("k", 2)
    assert [block.key for block in tier.ready(prefix("k", 4)[1:])] == prefix("k", 2)[1:]
    assert (tier.ready([b"unknown"]), tier.loadable(prefix("k", 6))) == ([], 2)


def test_as_many_blocks_are_taken_as_there_is_room_in_order() -> None:
    tier = HostTier(3)
    assert tier.free_slots == 3
    assert [block.key for block in tier.reserve(prefix("k", 5), 0.0, lambda _: 0.0)] == prefix("k", 3)
    assert (tier.free_slots, tier.reserve(prefix("k", 5), 0.0, lambda _: 0.0)) == (0, [])


def test_no_more_is_evicted_than_is_missing() -> None:
    tier = HostTier(6)
    stored(tier, prefix("old", 4))
    assert len(stored(tier, prefix("new", 3))) == 3

    assert tier.known(prefix("old", 4)) == 3
    assert tier.free_slots == 0


@pytest.mark.parametrize(("distance", "taken"), [(9.9, 0), (10.0, 0), (10.1, 1)])
def test_only_what_is_needed_later_than_what_comes_is_evicted(distance: float, taken: int) -> None:
    tier = HostTier(2)
    stored(tier, prefix("old", 2))

    assert len(tier.reserve(prefix("new", 1), 0.0, lambda _: distance, own_distance=10.0)) == taken
    assert len(tier.reserve(prefix("new", 1), 0.0, far)) == 1 - taken or taken


def test_without_a_distance_of_its_own_whatever_comes_evicts() -> None:
    tier = HostTier(1)
    stored(tier, prefix("old", 1))

    assert len(tier.reserve(prefix("new", 1), 0.0, lambda _: -1e9)) == 1


def test_of_blocks_as_far_off_the_least_recently_used_goes() -> None:
    tier = HostTier(3)
    for name, used_s in (("a", 5.0), ("b", 3.0), ("c", 4.0)):
        stored(tier, prefix(name, 1), used_s)
    tier.touch(prefix("b", 1), 9.0)
    tier.reserve(prefix("new", 1), 0.0, far)

    assert [tier.known(prefix(name, 1)) for name in "abc"] == [1, 1, 0]


def test_touching_stops_where_a_prefix_leaves_the_host() -> None:
    tier = HostTier(3)
    first, second = stored(tier, prefix("k", 2))
    tier.touch([b"k0", b"unknown", b"k1"], 7.0)

    assert (first.used_s, second.used_s) == (7.0, 0.0)


def test_the_block_before_an_evicted_end_is_as_near_as_that_was() -> None:
    tier = HostTier(4)
    stored(tier, prefix("near", 2))
    stored(tier, prefix("far", 2))
    distance = {b"near1": 5.0, b"far1": 20.0, b"far0": 1.0}
    evicted: list[bytes] = []
    tier.on_evict = lambda block: evicted.append(block.key)
    tier.reserve(prefix("new", 4), 0.0, lambda block: distance.get(block.key, inf))

    assert evicted == [b"far1", b"near1", b"near0", b"far0"]


def test_a_fork_is_evicted_when_its_last_branch_is() -> None:
    tier = HostTier(3)
    stored(tier, [b"root", b"left"])
    stored(tier, [b"root", b"right"])
    evicted: list[bytes] = []
    tier.on_evict = lambda block: evicted.append(block.key)
    tier.reserve(prefix("new", 3), 0.0, far)

    assert evicted[-1] == b"root"
    assert sorted(evicted) == [b"left", b"right", b"root"]


def test_the_block_before_an_evicted_one_stays_while_it_is_pinned() -> None:
    tier = HostTier(2)
    first, _ = stored(tier, prefix("k", 2))
    tier.pin([first])

    assert len(tier.reserve(prefix("new", 2), 0.0, far)) == 1
    assert tier.known(prefix("k", 2)) == 1


def test_pins_are_counted() -> None:
    tier = HostTier(1)
    blocks = stored(tier, prefix("k", 1))
    for _ in range(2):
        tier.pin(blocks)
    tier.unpin(blocks)
    assert (blocks[0].pins, tier.reserve(prefix("new", 1), 0.0, far)) == (1, [])
    tier.unpin(blocks)
    assert len(tier.reserve(prefix("new", 1), 0.0, far)) == 1


def test_a_prefix_grows_from_the_end_that_is_here() -> None:
    tier = HostTier(4)
    stored(tier, prefix("k", 2))
    grown = tier.reserve(prefix("k", 4), 0.0, far)

    assert [block.key for block in grown] == [b"k2", b"k3"]
    assert grown[0].parent is not None
    assert (grown[0].parent.key, grown[0].parent.children, grown[0].parent.pins) == (b"k1", 1, 0)
    assert not tier.broken_rules()


def test_what_is_before_a_hit_was_hit_too() -> None:
    tier = HostTier(5)
    blocks = stored(tier, prefix("k", 3))
    tier.hit([])
    tier.hit([b"unknown"])
    assert [block.was_hit for block in blocks] == [False] * 3
    tier.hit(prefix("k", 2))
    assert [block.was_hit for block in blocks] == [True, True, False]
    tier.hit([*prefix("k", 3), b"unknown"])
    assert [block.was_hit for block in blocks] == [True, True, True]


def test_what_hangs_on_a_forgotten_block_is_forgotten_and_nothing_else() -> None:
    tier = HostTier(9)
    blocks = stored(tier, prefix("k", 4))
    stored(tier, prefix("other", 2))
    tier.forget([blocks[2]])
    assert (tier.known(prefix("k", 4)), tier.known(prefix("other", 2)), tier.free_slots) == (2, 2, 5)
    tier.forget([blocks[2], blocks[3]])
    assert (tier.known(prefix("k", 4)), tier.free_slots) == (2, 5), "they are gone already"
    tier.forget([])
    assert not tier.broken_rules()


def test_a_copy_into_a_forgotten_block_does_not_make_it_ready() -> None:
    tier = HostTier(2)
    blocks = tier.reserve(prefix("k", 1), 0.0, far)
    tier.forget(blocks)
    assert (tier.free_slots, blocks[0].is_gone) == (1, True)
    tier.settle(blocks, ok=True)
    assert (tier.free_slots, blocks[0].is_ready, tier.ready(prefix("k", 1))) == (2, False, [])


def test_slots_are_used_again_before_new_ones() -> None:
    tier = HostTier(3)
    tier.forget(stored(tier, prefix("k", 1)))

    assert [block.slot for block in tier.reserve(prefix("new", 3), 0.0, far)] == [0, 1, 2]
    assert tier.free_slots == 0


def broken(**changes: object) -> list[str]:
    """The rules that do not hold after this was changed in a prefix of two blocks."""
    tier = HostTier(4)
    first, second = stored(tier, prefix("k", 2))
    match changes:
        case {"slot": int(slot)}:
            second.slot = slot
        case {"parent": None}:
            second.parent = HostBlock(b"other", 3, None, 0.0)
        case {"children": int(children)}:
            first.children = children
        case {"gone": True}:
            second.is_gone = True
        case {"end": True}:
            tier._ends[first.key] = first
        case {"free": int(slot)}:
            tier._free.append(slot)
    return tier.broken_rules()


def test_the_rules_notice_what_is_wrong() -> None:
    assert broken() == []
    assert broken(slot=0) == ["a slot has two owners"]
    assert "a block is here without the one before it" in broken(parent=None)
    assert broken(children=2) == ["children are miscounted"]
    assert broken(gone=True) == ["a forgotten block is in the index"]
    assert broken(end=True) == ["the ends of prefixes are wrong"]
    assert broken(free=3) == ["there are more slots than memory"]
