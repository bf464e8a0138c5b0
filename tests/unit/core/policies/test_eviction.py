"""When the end of a prefix on the host will be read again."""

from __future__ import annotations

from math import inf

import pytest

from tokencake.forecast.reuse import ReuseProbability
from tokencake.policies.eviction import LeastRecentlyUsed, NextUse, distance_s, unbounded
from tokencake.protocol import Hint
from tokencake.time_scheduler.host_tier import HostBlock, HostTier
from tokencake.time_scheduler.policy import EvictionInputs
from tokencake.time_scheduler.prefixes import PrefixIndex

PACE_S = 2.0
SURE = Hint(session="s", agent="sure", reuse="extends")
RARE = Hint(session="s", agent="rare")


def keys(name: str, count: int = 4) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(count)]


class Engine:
    """Chains, and the host that has some of them."""

    def __init__(self) -> None:
        self.prefixes, self.tier, self.reuse = PrefixIndex(), HostTier(100), ReuseProbability()

    def add(self, name: str, phase: str, back_s: float = 0.0, hint: Hint = SURE, *, stored: int = 4) -> None:
        prefix = self.prefixes.arrive(name, keys(name), hint, 0.0)
        assert prefix is None
        if phase == "stalled":
            self.prefixes.stall(name, keys(name), 0.0)
        self.prefixes.by_id[name].phase = phase  # type: ignore[assignment]
        self.prefixes.by_id[name].back_s = back_s
        self.tier.settle(self.tier.reserve(keys(name)[:stored], 0.0, unbounded), ok=True)

    def inputs(self, own: str, positions: dict[str, int], now_s: float) -> EvictionInputs:
        prefixes = self.prefixes
        return EvictionInputs(prefixes.by_id[own], prefixes, self.tier, self.reuse, now_s, PACE_S, lambda: positions)

    def distances(self, own: str, positions: dict[str, int], now_s: float = 0.0) -> tuple[dict[str, float], float]:
        distance, own_s = NextUse().distances(self.inputs(own, positions, now_s))
        ends = {
            prefix.id: distance(self.tier.ready(prefix.block_hashes)[-1])
            for prefix in self.prefixes
            if self.tier.known(prefix.block_hashes)
        }
        return ends, own_s


def test_a_call_is_read_again_after_those_before_it_a_stalled_one_after_its_stall_and_a_running_one_last() -> None:
    assert distance_s("waiting", 3, 99.0, 5, PACE_S) == 6.0
    assert distance_s("stalled", 3, 8.0, 5, PACE_S) == 5 * 2.0 + 8.0
    assert distance_s("running", 3, 1.0, 5, PACE_S) == 6 * 2.0 + 10.0
    assert distance_s("running", 3, 1.5, 5, PACE_S) == 6 * 2.0 + 15.0
    assert distance_s("waiting", 3, 0.0, 5, 0.0) == pytest.approx(0.003), "however fast calls are admitted"


def test_waiting_calls_are_read_in_the_order_of_the_queue() -> None:
    engine = Engine()
    for name in ("first", "second", "behind"):
        engine.add(name, "waiting")
    ends, own_s = engine.distances("second", {"first": 0, "second": 1})

    assert ends == {"first": 0.0, "second": 2.0, "behind": 4.0}, "one that the queue does not name comes after it"
    assert own_s == 2.0


def test_a_stalled_prefix_is_read_when_the_queue_is_through_and_its_agent_back() -> None:
    engine = Engine()
    engine.add("soon", "stalled", back_s=13.0)
    engine.add("late", "stalled", back_s=40.0)
    engine.add("runs", "running")
    ends, own_s = engine.distances("late", {"x": 0, "y": 1, "z": 2}, now_s=10.0)

    assert ends == {"soon": 6.0 + 3.0, "late": 6.0 + 30.0, "runs": 8.0 + 10.0}
    assert own_s == 36.0


def test_what_is_rarely_extended_is_farther_off_in_proportion_up_to_a_hundred_times() -> None:
    engine = Engine()
    engine.add("half", "stalled", back_s=10.0, hint=RARE)
    assert engine.distances("half", {})[0] == {"half": 20.0}

    for _ in range(500):
        engine.reuse.learn(RARE, came=False)
    probability = engine.reuse.probability(RARE)
    assert engine.distances("half", {})[1] == pytest.approx(10.0 / max(0.01, probability))
    assert engine.distances("half", {})[1] <= 1_000.0


def test_a_prefix_that_is_not_stored_yet_has_a_distance_only_for_itself() -> None:
    engine = Engine()
    engine.add("own", "stalled", back_s=5.0, stored=0)
    engine.add("other", "stalled", back_s=7.0, stored=0)
    ends, own_s = engine.distances("own", {})

    assert (ends, own_s) == ({}, 5.0)


def test_a_block_at_which_two_prefixes_end_is_as_near_as_the_nearer_one() -> None:
    engine = Engine()
    engine.add("one", "waiting")
    engine.prefixes.arrive("two", keys("one"), SURE, 0.0)
    for name, back_s in (("one", 9.0), ("two", 4.0)):
        engine.prefixes.stall(name, keys("one"), 0.0)
        engine.prefixes.by_id[name].back_s = back_s
    assert engine.distances("one", {})[0]["one"] == 4.0

    engine.prefixes.by_id["two"].back_s = 14.0
    assert engine.distances("one", {})[0]["one"] == 9.0


def test_only_the_end_that_the_host_has_of_a_prefix_is_near() -> None:
    engine = Engine()
    engine.add("own", "stalled", back_s=5.0, stored=3)
    distance, _ = NextUse().distances(engine.inputs("own", {}, 0.0))
    blocks = engine.tier.ready(keys("own"))

    assert [distance(block) for block in blocks] == [inf, inf, 5.0]


def test_the_least_recently_used_is_the_farthest() -> None:
    old, new = (HostBlock(b"k", 0, None, used_s) for used_s in (1.0, 4.0))

    engine = Engine()
    engine.add("own", "stalled")
    distance, own_s = LeastRecentlyUsed().distances(engine.inputs("own", {}, 10.0))

    assert [distance(block) for block in (old, new)] == [9.0, 6.0]
    assert own_s < 0.0, "it is nearer than all"
    assert unbounded(old) == inf
