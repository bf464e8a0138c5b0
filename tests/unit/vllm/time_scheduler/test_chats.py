"""Hints never cost cached prefixes: whatever is told, as much is found as in stock vLLM for the same requests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.harness.chats import ENDS, SHAPES, Chats, PluginEngine, StockEngine, actions, cached_tokens

ROOMY, HOST_BLOCKS = 3_000, 2
MIN_SHARE = 0.95
"""Of stock's hits under pressure."""


def play(
    patch: pytest.MonkeyPatch, trace: list[tuple[Any, ...]], *, num_blocks: int, is_async: bool
) -> tuple[dict[str, int], dict[str, int], Chats]:
    """Hits with hints and in stock vLLM."""
    ours = PluginEngine(patch, num_blocks=num_blocks, host_blocks=HOST_BLOCKS, is_async=is_async)
    stock = StockEngine(num_blocks=num_blocks, is_async=is_async)
    chats = Chats(ours, stock)
    chats.play(trace)
    ours.harness.check()
    return cached_tokens(ours), cached_tokens(stock), chats


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
@pytest.mark.parametrize("end", sorted(set(ENDS)))
def test_a_thread_finds_its_last_turn_whatever_its_runs_do_and_say_of_their_end(
    monkeypatch: pytest.MonkeyPatch, shape: str, end: str
) -> None:
    """Answers, tools, interrupts, parallel runs, retries, forks from an old checkpoint and crashes; two graphs."""
    turns = [("turn", 0, turn % 2, shape, 20 + turn, 24, None, end) for turn in range(6)]
    trace = [action for turn in turns for action in (turn, ("again", 0))]
    ours, stock, _ = play(monkeypatch, trace, num_blocks=ROOMY, is_async=False)
    assert ours == stock
    assert sum(stock.values()) > 0


@pytest.mark.parametrize("is_async", [False, True])
@given(trace=st.lists(actions, min_size=4, max_size=30))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_while_everything_fits_every_request_finds_what_it_finds_in_stock_vllm(
    trace: list[tuple[Any, ...]], is_async: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        ours, stock, _ = play(patch, trace, num_blocks=ROOMY, is_async=is_async)
    assert {name: (ours[name], tokens) for name, tokens in stock.items() if ours[name] < tokens} == {}


@pytest.mark.parametrize("is_async", [False, True])
def test_under_pressure_hardly_less_is_found_than_in_stock_vllm(is_async: bool) -> None:
    """Over a fixed set of traces: in a single one, vLLM's own order may happen to fit better."""
    totals: Counter[str] = Counter()

    @given(trace=st.lists(actions, min_size=10, max_size=40), num_blocks=st.integers(110, 240))
    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    def add_up(trace: list[tuple[Any, ...]], num_blocks: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            ours, stock, chats = play(patch, trace, num_blocks=num_blocks, is_async=is_async)
        assume(chats.largest < num_blocks - 2)
        totals.update(ours=sum(ours.values()), stock=sum(stock.values()))

    add_up()
    assert totals["ours"] >= MIN_SHARE * totals["stock"] > 0
