"""Seconds of steps that overlap."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tokencake_vllm.step_clock import StepClock


def test_a_step_takes_from_its_begin_to_its_end() -> None:
    clock = StepClock()
    clock.schedule(10.0)
    assert clock.complete(13.0) == 3.0
    clock.schedule(20.0)
    assert clock.complete(21.0) == 1.0


def test_a_step_that_is_scheduled_ahead_begins_when_the_one_before_it_ends() -> None:
    clock = StepClock()
    for now in (10.0, 11.0, 14.5):
        clock.schedule(now)

    assert [clock.complete(now) for now in (13.0, 14.0, 17.0)] == [3.0, 1.0, 2.5]


def test_a_step_that_was_never_scheduled_took_no_time() -> None:
    clock = StepClock()

    assert clock.complete(13.0) == 0.0
