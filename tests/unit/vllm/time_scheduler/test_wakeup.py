"""Times at which chains want to be looked at, and the timer for the first of them."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tokencake_vllm.time_scheduler import wakeup
from tokencake_vllm.time_scheduler.wakeup import WakeupTimer


class Timer:
    """In place of a thread."""

    made: list[Timer]

    def __init__(self, interval: float, function: Any) -> None:
        self.interval, self.function = interval, function
        self.daemon = self.is_started = self.is_cancelled = self.is_over = False
        self.made.append(self)

    def start(self) -> None:
        self.is_started = True

    def cancel(self) -> None:
        self.is_cancelled = True

    def is_alive(self) -> bool:
        return self.is_started and not self.is_cancelled and not self.is_over


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Timer]:
    Timer.made = []
    monkeypatch.setattr(wakeup.threading, "Timer", Timer)
    return Timer.made


def anyone(_: str) -> bool:
    return True


def set_up(**times: float) -> WakeupTimer:
    alarm = WakeupTimer()
    alarm.wake = lambda: None
    for name, when_s in times.items():
        alarm.set(name, when_s)
    return alarm


def test_prefixes_are_due_from_their_time_on_in_its_order() -> None:
    alarm = set_up(late=3.0, early=1.0, never=inf, same=3.0)
    assert [alarm.is_due(now) for now in (0.9, 1.0)] == [False, True]
    assert list(alarm.take_due(0.5)) == []
    assert list(alarm.take_due(2.0)) == ["early"]
    assert list(alarm.take_due(3.0)) == ["late", "same"]
    assert not alarm.is_due(1e9)


def test_the_next_time_is_that_of_a_prefix_that_is_still_of_interest() -> None:
    alarm = set_up(gone=1.0, live=2.0, also=3.0)

    assert alarm.next_s(anyone) == 1.0
    assert alarm.next_s(lambda name: name != "gone") == 2.0
    assert list(alarm.take_due(9.0)) == ["live", "also"], "what is of no interest is forgotten"
    assert alarm.next_s(anyone) is None


def test_a_chain_that_is_never_due_is_no_reason_to_wake(timers: list[Timer]) -> None:
    alarm = set_up(never=inf)
    assert alarm.next_s(anyone) is None
    alarm.arm(10.0, anyone)
    assert timers == []


def test_an_engine_that_sleeps_is_woken_when_the_first_is_due(timers: list[Timer]) -> None:
    alarm = set_up(a=15.0)
    alarm.arm(10.0, anyone)
    (timer,) = timers

    assert (timer.interval, timer.daemon, timer.is_started, timer.function) == (5.0, True, True, alarm.wake)
    set_up(a=5.0).arm(10.0, anyone)
    assert timers[1].interval == 0.0, "what is overdue is due now"


def test_without_a_way_to_wake_or_a_reason_no_timer_is_started(timers: list[Timer]) -> None:
    set_up().arm(10.0, anyone)
    set_up(a=15.0).arm(10.0, lambda _: False)
    alarm = set_up(a=15.0)
    alarm.wake = None
    alarm.arm(10.0, anyone)

    assert timers == []


def test_a_timer_is_replaced_only_by_an_earlier_one_or_when_it_is_over(timers: list[Timer]) -> None:
    alarm = set_up(a=15.0)
    alarm.arm(10.0, anyone)
    alarm.arm(11.0, anyone)
    alarm.set("later", 20.0)
    alarm.arm(11.0, anyone)
    assert len(timers) == 1
    alarm.set("earlier", 14.0)
    alarm.arm(11.0, anyone)
    assert [timer.is_cancelled for timer in timers] == [True, False]
    assert timers[1].interval == 3.0

    timers[1].is_over = True
    list(alarm.take_due(15.0))
    alarm.arm(15.0, anyone)
    assert [timer.interval for timer in timers] == [5.0, 3.0, 5.0]
    assert not timers[1].is_cancelled
