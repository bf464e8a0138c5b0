"""How the probability that a call is extended moves with what was seen."""

from __future__ import annotations

import pytest

from tokencake.forecast.reuse import FADE, MAX_BELIEVED, ReuseProbability
from tokencake.forecast.roles import role_of
from tokencake.protocol import Hint

EXTENDS = Hint(session="s", agent="a", reuse="extends")
SILENT = Hint(session="s", agent="b")


def test_before_anything_was_seen_the_hint_counts() -> None:
    reuse = ReuseProbability()

    assert reuse.probability(EXTENDS) == 1.0
    assert reuse.probability(SILENT) == 0.5
    assert reuse.probability(None) == 0.5
    assert reuse.probability(EXTENDS, "final") == 0.0
    assert reuse.probability(None, "over") == 0.0


def test_what_was_seen_outweighs_the_hint_with_its_number() -> None:
    reuse = ReuseProbability()
    reuse.learn(EXTENDS, came=False)
    assert reuse.probability(EXTENDS) == pytest.approx(1 / 2)
    reuse.learn(EXTENDS, came=True)
    assert reuse.probability(EXTENDS) == pytest.approx((1 + 1) / (FADE + 1 + 1))
    reuse.learn(EXTENDS, came=False)
    assert reuse.probability(EXTENDS) == pytest.approx((FADE + 1) / (FADE**2 + FADE + 1 + 1))


def test_a_call_that_comes_raises_the_chance_and_one_that_does_not_lowers_it() -> None:
    reuse = ReuseProbability()
    probabilities = []
    for came in (True, True, False, False):
        reuse.learn(SILENT, came=came)
        probabilities.append(reuse.probability(SILENT))

    assert 0.5 < probabilities[0] < probabilities[1] > probabilities[2] > probabilities[3]


def test_claims_are_counted_apart() -> None:
    reuse = ReuseProbability()
    reuse.refute(role_of(SILENT), "final")

    assert reuse.probability(SILENT, "final") == pytest.approx(1 / 2)
    assert reuse.probability(SILENT, "over") == 0.0
    assert reuse.probability(SILENT) == 0.5


def test_a_claim_is_believed_until_it_is_refuted_and_again_after_enough_true_ones() -> None:
    reuse = ReuseProbability()
    assert reuse.is_believed(SILENT, "final")
    reuse.refute(role_of(SILENT), "final")
    assert not reuse.is_believed(SILENT, "final")

    for _ in range(12):
        reuse.learn(SILENT, came=False, claim="final")
        assert reuse.is_believed(SILENT, "final") == (reuse.probability(SILENT, "final") < MAX_BELIEVED)
    assert reuse.is_believed(SILENT, "final")


def test_a_call_without_a_hint_teaches_nothing() -> None:
    reuse = ReuseProbability()
    reuse.learn(None, came=False)

    assert reuse.probability(None) == 0.5
