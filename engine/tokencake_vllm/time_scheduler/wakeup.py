"""Wake-up of a sleeping engine when something is due.

A heap of times; and, only while the engine has nothing else to do, one thread that sleeps until the first of them and
then puts vLLM's own wake-up message into the engine's input queue.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterator
from math import inf


class WakeupTimer:
    """Times at which stalled prefixes are due."""

    def __init__(self) -> None:
        self.wake: Callable[[], None] | None = None
        """Makes the engine loop look for work, from any thread; None until the engine has made itself known."""
        self._due: list[tuple[float, int, str]] = []
        self._ticket = itertools.count()
        self._timer: threading.Timer | None = None
        self._timer_s = inf

    def set(self, prefix_id: str, when_s: float) -> None:
        """Make the prefix due at `when_s`, beside earlier times."""
        if when_s < inf:
            heapq.heappush(self._due, (when_s, next(self._ticket), prefix_id))

    def is_due(self, now_s: float) -> bool:
        """Whether something is."""
        return bool(self._due) and self._due[0][0] <= now_s

    def take_due(self, now_s: float) -> Iterator[str]:
        """The prefixes that are due, each taken off the list."""
        while self.is_due(now_s):
            yield heapq.heappop(self._due)[2]

    def next_s(self, is_live: Callable[[str], bool]) -> float | None:
        """When the first prefix that is still stalled is due; None where there is none."""
        while self._due and not is_live(self._due[0][2]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def arm(self, now_s: float, is_live: Callable[[str], bool]) -> None:
        """The engine is about to sleep: see that it is woken for the first prefix that is still stalled."""
        when_s = self.next_s(is_live)
        if self.wake is None or when_s is None:
            return
        if self._timer is not None and self._timer.is_alive():
            if self._timer_s <= when_s:
                return
            self._timer.cancel()
        self._timer_s = when_s
        self._timer = threading.Timer(max(0.0, when_s - now_s), self.wake)
        self._timer.daemon = True
        self._timer.start()
