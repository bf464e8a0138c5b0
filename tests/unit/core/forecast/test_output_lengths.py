"""Quantiles over the recent lengths of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.forecast.output_lengths import OutputLengthHistory
from tokencake.forecast.roles import Role

WRITER = Role("writer")


def lengths_of(*tokens: int) -> OutputLengthHistory:
    lengths = OutputLengthHistory()
    for count in tokens:
        lengths.learn(WRITER, count)
    return lengths


def test_four_answers_are_enough_and_three_are_not() -> None:
    assert lengths_of(1, 2, 3).quantile(WRITER, 0.5) is None
    assert lengths_of(1, 2, 3, 4).quantile(WRITER, 0.5) is not None


@pytest.mark.parametrize(
    ("share", "tokens"), [(0.0, 10), (0.1, 20), (0.15, 20), (0.5, 60), (0.89, 90), (0.9, 100), (1.0, 100)]
)
def test_a_quantile_is_the_answer_at_that_share_of_the_ordered_ones(share: float, tokens: int) -> None:
    assert lengths_of(100, 10, 90, 20, 80, 30, 70, 40, 60, 50).quantile(WRITER, share) == tokens


def test_only_the_newest_answers_count() -> None:
    lengths = lengths_of(*[1_000] * 64)
    for _ in range(63):
        lengths.learn(WRITER, 5)
    assert lengths.quantile(WRITER, 1.0) == 1_000, "the last of the old ones is the 64th"

    lengths.learn(WRITER, 5)
    assert lengths.quantile(WRITER, 1.0) == 5


def test_roles_have_lengths_of_their_own() -> None:
    lengths = lengths_of(1, 1, 1, 1)

    assert lengths.quantile(Role("reader"), 0.5) is None
    assert lengths.quantile(Role("writer", tenant="t::"), 0.5) is None


@given(st.lists(st.integers(1, 10_000), min_size=4, max_size=64), st.floats(0.0, 1.0))
def test_a_quantile_is_one_of_the_answers_and_grows_with_its_share(answers: list[int], share: float) -> None:
    lengths = lengths_of(*answers)
    found = lengths.quantile(WRITER, share)

    assert found in answers
    assert min(answers) == lengths.quantile(WRITER, 0.0) <= found <= lengths.quantile(WRITER, 1.0) == max(answers)
    assert sum(tokens < found for tokens in answers) <= share * len(answers)
