"""Which blocks of dropped prefixes go first, and what refutes that a prefix is dropped."""

from __future__ import annotations

from tokencake.forecast.roles import Role
from tokencake.time_scheduler.dropped import Dropped, SharedBlocks

ROLE = Role("a")


def blocks(name: str, count: int) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(count)]


class Refuted(list[tuple[Role, str]]):
    """What `Dropped` has been told to be untrue."""

    def __call__(self, role: Role, claim: str) -> None:
        self.append((role, claim))


def dropped(capacity: int = 100) -> tuple[Dropped, Refuted]:
    refuted = Refuted()
    return Dropped(capacity, refuted), refuted


def test_a_block_is_private_until_another_lifetime_has_used_it() -> None:
    shared = SharedBlocks(10)
    shared.use(blocks("k", 3), "one")
    assert all(shared.is_exclusive(key, "one") for key in blocks("k", 3))
    assert not shared.is_exclusive(b"k0", "two")
    assert shared.is_exclusive(b"never seen", "two")

    shared.use(blocks("k", 2), "two")
    assert [shared.is_exclusive(key, "one") for key in blocks("k", 3)] == [False, False, True]
    shared.use(blocks("k", 2), "one")
    assert not shared.is_exclusive(b"k0", "one"), "several stay several"


def test_the_longest_unused_blocks_are_forgotten_and_of_one_use_the_tail_first() -> None:
    shared = SharedBlocks(3)
    shared.use(blocks("k", 2), "one")
    shared.use(blocks("m", 1), "one")
    assert not shared.is_exclusive(b"k1", "two")

    shared.use(blocks("n", 1), "one")
    assert shared.is_exclusive(b"k1", "two"), "nothing is known of it any more"
    assert not shared.is_exclusive(b"k0", "two")


def test_dropped_blocks_are_taken_oldest_first_and_then_stand_first() -> None:
    drops, _ = dropped()
    drops.add(ROLE, "final", "one", blocks("k", 2))
    drops.add(ROLE, "final", "two", blocks("m", 1))
    assert (len(drops), drops.is_first(b"k0")) == (3, False)

    assert [drops.take() for _ in range(4)] == [b"k0", b"k1", b"m0", None]
    assert (len(drops), drops.is_first(b"k0")) == (0, True)


def test_a_block_that_cannot_go_first_yet_is_taken_again_later_and_one_that_is_wanted_is_not() -> None:
    drops, _ = dropped()
    drops.add(ROLE, "final", "one", blocks("k", 2))
    for _ in range(2):
        drops.take()
    drops.put_back(b"k0")
    drops.discard(b"k1")
    drops.put_back(b"k1")

    assert (len(drops), drops.take(), drops.take()) == (1, b"k0", None)


def test_beyond_the_capacity_those_that_stand_first_are_forgotten_first() -> None:
    drops, _ = dropped(capacity=3)
    drops.add(ROLE, "final", "one", blocks("k", 2))
    drops.take()
    drops.add(ROLE, "final", "two", blocks("m", 1))
    assert drops.is_first(b"k0"), "three fit"
    drops.add(ROLE, "final", "three", blocks("n", 1))
    assert not drops.is_first(b"k0")
    drops.add(ROLE, "final", "four", blocks("o", 1))

    assert [drops.take() for _ in range(4)] == [b"m0", b"n0", b"o0", None]


def test_a_block_that_is_dropped_twice_counts_once_and_is_the_youngest() -> None:
    drops, _ = dropped()
    drops.add(ROLE, "final", "one", blocks("k", 2))
    drops.take()
    drops.add(ROLE, "over", "one", blocks("k", 1))

    assert (len(drops), drops.is_first(b"k0")) == (2, False)
    assert [drops.take(), drops.take()] == [b"k1", b"k0"]


def test_a_call_of_the_same_lifetime_refutes_the_claim_with_one_block() -> None:
    drops, refuted = dropped()
    drops.add(ROLE, "final", "one", blocks("k", 8))

    assert drops.wake(blocks("k", 1), "one") == []
    assert refuted == [(ROLE, "final")]
    drops.wake(blocks("k", 8), "one")
    assert refuted == [(ROLE, "final")], "once"
    assert drops.take() is None


def test_a_call_of_another_lifetime_refutes_the_claim_with_half_of_the_blocks() -> None:
    drops, refuted = dropped()
    drops.add(ROLE, "over", "one", blocks("k", 5))
    drops.wake(blocks("k", 2), "two")
    assert refuted == []
    drops.wake([b"k2"], "three")
    assert refuted == [(ROLE, "over")]

    drops.add(ROLE, "final", "one", blocks("m", 4))
    drops.wake([b"m0"], "two")
    assert len(refuted) == 1
    drops.wake([b"m1"], "two")
    assert refuted[1:] == [(ROLE, "final")], "two of four are half"


def test_those_that_were_first_are_told_when_a_call_asks_for_them() -> None:
    drops, _ = dropped()
    assert drops.wake(blocks("k", 3), "one") == []
    drops.add(ROLE, "final", "one", blocks("k", 3))
    drops.take()

    assert drops.wake([*blocks("k", 3), b"unknown"], "one") == [b"k0"]
    assert (len(drops), drops.is_first(b"k0")) == (0, False)


def test_all_first_and_none_waiting_is_not_nothing() -> None:
    drops, refuted = dropped()
    drops.add(ROLE, "final", "one", blocks("k", 1))
    drops.take()

    assert drops.wake(blocks("k", 1), "one") == [b"k0"]
    assert refuted == [(ROLE, "final")]


def test_a_reset_forgets_everything() -> None:
    drops, _ = dropped()
    drops.add(ROLE, "final", "one", blocks("k", 2))
    drops.take()
    drops.clear()

    assert (len(drops), drops.is_first(b"k0"), drops.take()) == (0, False, None)
