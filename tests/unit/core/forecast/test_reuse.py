"""Will the next call come, and will what waits for it still be there?"""

from __future__ import annotations

from math import inf

import pytest

from tokencake.forecast.costs import CacheResidency
from tokencake.forecast.reuse import ReuseProbability
from tokencake.protocol import Hint


def at(node: str, reuse: str = "extends") -> Hint:
    return Hint(session="s", agent="a", node=node, reuse=reuse)  # type: ignore[arg-type]  # one of the three


def test_the_hint_is_believed_until_it_was_wrong() -> None:
    reuse = ReuseProbability()
    assert reuse.probability(at("n")) == 1.0
    assert reuse.probability(at("n", "unknown")) == reuse.probability(None) == 0.5
    for _ in range(2):
        reuse.learn(at("n"), came=False)
    assert reuse.probability(at("n")) < 0.5
    assert reuse.probability(at("other")) == 1.0


def test_a_node_that_has_changed_is_believed_again() -> None:
    reuse = ReuseProbability()
    for came in [False] * 20 + [True] * 20:
        reuse.learn(at("n"), came=came)
    assert reuse.probability(at("n")) > 0.8


def test_what_was_found_and_what_was_missed_tell_how_long_blocks_stay() -> None:
    residency = CacheResidency()
    assert residency.seconds == inf
    residency.learn(8.0, was_there=False)
    assert residency.seconds == 8.0
    residency.learn(2.0, was_there=False)
    assert residency.seconds == 5.0
    residency.learn(3.0, was_there=True)
    residency.learn(9.0, was_there=False)
    assert residency.seconds == 5.0
    residency.learn(7.0, was_there=True)
    assert residency.seconds == 6.0


def test_while_calls_take_few_blocks_they_stay_longer_than_they_did() -> None:
    residency = CacheResidency(seconds=2.0)
    residency.take(1_000, 100.0)
    assert residency.from_now_s(1_000, 100.0) == pytest.approx(5.0)
    assert residency.from_now_s(1_000, 140.0) > 200.0
    assert residency.from_now_s(10, 100.0) == 2.0
