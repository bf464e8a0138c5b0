"""How the probability that a call is extended moves with what was seen."""

from __future__ import annotations

import pytest

from tokencake.forecast.reuse import FADE, MAX_CLAIMED, Returns
from tokencake.forecast.roles import role_of
from tokencake.protocol import Hint

EXTENDS = Hint(session="s", agent="a", reuse="extends")
SILENT = Hint(session="s", agent="b")


def test_before_anything_was_seen_the_hint_counts() -> None:
    returns = Returns()

    assert returns.chance(EXTENDS) == 1.0
    assert returns.chance(SILENT) == 0.5
    assert returns.chance(None) == 0.5
    assert returns.chance(EXTENDS, "final") == 0.0
    assert returns.chance(None, "over") == 0.0


def test_what_was_seen_outweighs_the_hint_with_its_number() -> None:
    returns = Returns()
    returns.learn(EXTENDS, came=False)
    assert returns.chance(EXTENDS) == pytest.approx(1 / 2)
    returns.learn(EXTENDS, came=True)
    assert returns.chance(EXTENDS) == pytest.approx((1 + 1) / (FADE + 1 + 1))
    returns.learn(EXTENDS, came=False)
    assert returns.chance(EXTENDS) == pytest.approx((FADE + 1) / (FADE**2 + FADE + 1 + 1))


def test_a_call_that_comes_raises_the_chance_and_one_that_does_not_lowers_it() -> None:
    returns = Returns()
    chances = []
    for came in (True, True, False, False):
        returns.learn(SILENT, came=came)
        chances.append(returns.chance(SILENT))

    assert 0.5 < chances[0] < chances[1] > chances[2] > chances[3]


def test_claims_are_counted_apart() -> None:
    returns = Returns()
    returns.refute(role_of(SILENT), "final")

    assert returns.chance(SILENT, "final") == pytest.approx(1 / 2)
    assert returns.chance(SILENT, "over") == 0.0
    assert returns.chance(SILENT) == 0.5


def test_a_claim_is_believed_until_it_is_refuted_and_again_after_enough_true_ones() -> None:
    returns = Returns()
    assert returns.is_believed(SILENT, "final")
    returns.refute(role_of(SILENT), "final")
    assert not returns.is_believed(SILENT, "final")

    for _ in range(12):
        returns.learn(SILENT, came=False, claim="final")
        assert returns.is_believed(SILENT, "final") == (returns.chance(SILENT, "final") < MAX_CLAIMED)
    assert returns.is_believed(SILENT, "final")


def test_a_call_without_a_hint_teaches_nothing() -> None:
    returns = Returns()
    returns.learn(None, came=False)

    assert returns.chance(None) == 0.5
