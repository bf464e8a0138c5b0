"""Will the next call come, and will what waits for it still be there?"""

from __future__ import annotations

from math import inf

import pytest

from tokencake.forecast.costs import Residence
from tokencake.forecast.reuse import Returns
from tokencake.protocol import Hint


def at(node: str, reuse: str = "extends") -> Hint:
    return Hint(session="s", agent="a", node=node, reuse=reuse)  # type: ignore[arg-type]  # one of the three


def test_the_hint_is_believed_until_it_was_wrong() -> None:
    returns = Returns()
    assert returns.chance(at("n")) == 1.0
    assert returns.chance(at("n", "unknown")) == returns.chance(None) == 0.5
    for _ in range(2):
        returns.learn(at("n"), came=False)
    assert returns.chance(at("n")) < 0.5
    assert returns.chance(at("other")) == 1.0


def test_a_node_that_has_changed_is_believed_again() -> None:
    returns = Returns()
    for came in [False] * 20 + [True] * 20:
        returns.learn(at("n"), came=came)
    assert returns.chance(at("n")) > 0.8


def test_what_was_found_and_what_was_missed_tell_how_long_blocks_stay() -> None:
    residence = Residence()
    assert residence.seconds == inf
    residence.learn(8.0, was_there=False)
    assert residence.seconds == 8.0
    residence.learn(2.0, was_there=False)
    assert residence.seconds == 5.0
    residence.learn(3.0, was_there=True)
    residence.learn(9.0, was_there=False)
    assert residence.seconds == 5.0
    residence.learn(7.0, was_there=True)
    assert residence.seconds == 6.0


def test_while_calls_take_few_blocks_they_stay_longer_than_they_did() -> None:
    residence = Residence(seconds=2.0)
    residence.take(1_000, 100.0)
    assert residence.from_now_s(1_000, 100.0) == pytest.approx(5.0)
    assert residence.from_now_s(1_000, 140.0) > 200.0
    assert residence.from_now_s(10, 100.0) == 2.0
