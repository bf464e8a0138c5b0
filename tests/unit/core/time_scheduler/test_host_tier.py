"""The index of host memory: prefixes whole, shared once, bounded."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from tokencake.time_scheduler.host_tier import HostBlock, HostTier


def prefix(name: str, length: int) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(length)]


def far(block: HostBlock) -> float:
    return inf


def stored(tier: HostTier, keys: list[bytes], now_s: float = 0.0) -> int:
    blocks = tier.reserve(keys, now_s, far)
    tier.settle(blocks, ok=True)
    return len(blocks)


def test_a_shared_prefix_is_stored_once() -> None:
    tier = HostTier(100)
    shared = prefix("s", 5)
    assert stored(tier, shared + prefix("a", 3)) == 8
    assert stored(tier, shared + prefix("b", 3)) == 3
    assert len(tier) == 11


def test_a_block_on_its_way_is_known_and_not_ready() -> None:
    tier = HostTier(10)
    keys = prefix("a", 4)
    blocks = tier.reserve(keys, 0.0, far)
    assert (tier.known(keys), tier.ready(keys)) == (4, [])
    tier.settle(blocks[:2], ok=True)
    assert len(tier.ready(keys)) == 2


def test_the_farthest_end_goes_first_from_its_tail() -> None:
    tier = HostTier(8)
    near, away = prefix("n", 4), prefix("f", 4)
    stored(tier, near)
    stored(tier, away)
    distance = {near[-1]: 1.0, away[-1]: 50.0}
    blocks = tier.reserve(prefix("x", 3), 0.0, lambda block: distance.get(block.key, inf), own_distance=10.0)
    assert len(blocks) == 3
    assert (tier.known(near), tier.known(away)) == (4, 1)
    assert not tier.broken_rules()


def test_nothing_nearer_is_evicted_for_something_farther() -> None:
    tier = HostTier(4)
    near = prefix("n", 4)
    stored(tier, near)
    assert tier.reserve(prefix("x", 3), 0.0, lambda _: 5.0, own_distance=10.0) == []
    assert tier.known(near) == 4


def test_a_block_under_a_copy_is_not_evicted() -> None:
    tier = HostTier(4)
    stored(tier, prefix("a", 4))
    tier.pin(tier.ready(prefix("a", 4)))
    assert tier.reserve(prefix("x", 4), 0.0, far) == []


def test_the_head_of_a_prefix_is_not_evicted_for_its_tail() -> None:
    tier = HostTier(4)
    keys = prefix("a", 8)
    stored(tier, keys[:4])
    assert tier.reserve(keys, 0.0, far) == []
    assert tier.known(keys) == 4


def test_a_failed_copy_takes_with_it_what_hangs_on_it() -> None:
    tier = HostTier(20)
    keys = prefix("a", 8)
    first = tier.reserve(keys[:4], 0.0, far)
    second = tier.reserve(keys, 0.0, far)
    tier.settle(second, ok=True)
    tier.settle(first, ok=False)
    assert tier.known(keys) == 0
    assert (len(tier), tier.free_slots) == (0, 20)
    assert not tier.broken_rules()


def test_after_a_reset_a_slot_under_a_copy_comes_back_when_that_is_over() -> None:
    tier = HostTier(4)
    blocks = tier.reserve(prefix("a", 4), 0.0, far)
    tier.reset()
    assert (len(tier), tier.free_slots) == (0, 0)
    tier.settle(blocks, ok=True)
    assert (tier.ready(prefix("a", 4)), tier.free_slots) == ([], 4)


def test_no_memory_stores_nothing() -> None:
    assert HostTier(0).reserve(prefix("a", 3), 0.0, far) == []


steps = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "settle", "fail", "pin", "unpin", "forget", "reset"]),
        st.integers(0, 5),
        st.integers(1, 12),
        st.floats(0, 10),
    ),
    max_size=80,
)


@given(steps, st.integers(0, 20))
def test_the_rules_hold_whatever_happens(trace: list[tuple[str, int, int, float]], capacity: int) -> None:
    tier = HostTier(capacity)
    under_way: list[list[HostBlock]] = []
    pinned: list[list[HostBlock]] = []
    for step, name, length, distance in trace:
        keys = prefix("s", 3) + prefix(str(name), length) if name % 2 else prefix(str(name), length)
        match step:
            case "reserve":
                if blocks := tier.reserve(keys, 0.0, lambda block: block.slot, own_distance=distance - 5):
                    under_way.append(blocks)
            case "settle" | "fail" if under_way:
                tier.settle(under_way.pop(name % len(under_way)), ok=step == "settle")
            case "pin" if found := tier.ready(keys):
                tier.pin(found)
                pinned.append(found)
            case "unpin" if pinned:
                tier.unpin(pinned.pop(name % len(pinned)))
            case "forget":
                tier.forget(tier.ready(keys)[-2:])
            case "reset":
                tier.reset()
        assert not tier.broken_rules()
        assert tier.known(keys) >= len(tier.ready(keys))
    for blocks in under_way:
        tier.settle(blocks, ok=True)
    for blocks in pinned:
        tier.unpin(blocks)
    assert len(tier) + tier.free_slots == capacity


def test_a_capacity_that_is_not_used_costs_nothing() -> None:
    tier = HostTier(10**15)
    assert stored(tier, prefix("a", 3)) == 3
    assert tier.free_slots == 10**15 - 3
    tier.forget(tier.ready(prefix("a", 1)))
    assert tier.free_slots == 10**15
    assert {block.slot for block in tier.reserve(prefix("b", 4), 0.0, far)} == {0, 1, 2, 3}
    assert not tier.broken_rules()
