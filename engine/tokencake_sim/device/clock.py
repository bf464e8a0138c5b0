"""Virtual time: one clock with the callbacks that are due, lent to vLLM and the plug-in in place of `time`.

One clock, one heap, a counter that breaks ties: the same input gives the same trace. vLLM's scheduler and our plug-in
ask the `time` module; `virtual_time` lends them this clock instead.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

Callback = Callable[[], None]

TIME_ASKING_PACKAGES: Final = ("vllm.v1.", "tokencake_vllm", "tokencake.")
"""Modules whose `time` is replaced. The worker side of vLLM is among them, but is never run here."""


class Clock:
    """Virtual seconds since the start of the run, and the callbacks that are due at their times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callback]] = []
        self._scheduled = 0

    def at(self, time_s: float, callback: Callback) -> None:
        """Call `callback` when the clock reaches `time_s`; a time in the past is now."""
        self._scheduled += 1
        heapq.heappush(self._due, (max(time_s, self.now_s), self._scheduled, callback))

    def after(self, delay_s: float, callback: Callback) -> None:
        """Call `callback` in `delay_s` seconds."""
        self.at(self.now_s + delay_s, callback)

    @property
    def next_s(self) -> float | None:
        """When the next callback is due; None where nothing is."""
        return self._due[0][0] if self._due else None

    def advance_to(self, time_s: float) -> None:
        """Move to `time_s`, running every callback on the way at its own time. The clock never goes back."""
        while self._due and self._due[0][0] <= time_s:
            due_s, _, callback = heapq.heappop(self._due)
            self.now_s = max(self.now_s, due_s)
            callback()
        self.now_s = max(self.now_s, time_s)


class _TimeModule(ModuleType):
    """Stands where a module has said `import time`; `sleep` is absent because nothing simulated may block."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("time")
        self._clock = clock

    def time(self) -> float:
        return self._clock.now_s

    def monotonic(self) -> float:
        return self._clock.now_s

    def perf_counter(self) -> float:
        return self._clock.now_s

    def monotonic_ns(self) -> int:
        return int(self._clock.now_s * 1e9)

    def time_ns(self) -> int:
        return int(self._clock.now_s * 1e9)

    def perf_counter_ns(self) -> int:
        return int(self._clock.now_s * 1e9)


_CLOCK_NAMES: Final = ("time", "monotonic", "perf_counter", "monotonic_ns", "time_ns", "perf_counter_ns")


@contextmanager
def virtual_time(clock: Clock) -> Iterator[None]:
    """Lend `clock` to every loaded module of `TIME_ASKING_PACKAGES` that imported `time` or one of its functions."""
    fake = _TimeModule(clock)
    fakes: dict[int, object] = {id(time): fake}
    fakes |= {id(getattr(time, name)): getattr(fake, name) for name in _CLOCK_NAMES}
    patched: list[tuple[ModuleType, str, object]] = []
    for name, module in list(sys.modules.items()):
        if name.startswith(TIME_ASKING_PACKAGES):
            for attribute, value in list(vars(module).items()):
                if id(value) in fakes:
                    patched.append((module, attribute, value))
                    setattr(module, attribute, fakes[id(value)])
    try:
        yield
    finally:
        for module, attribute, value in patched:
            setattr(module, attribute, value)
