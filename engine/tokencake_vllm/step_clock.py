"""Device time of a step. With async scheduling the device begins a step when the one before it has ended."""

from __future__ import annotations

from collections import deque


class StepClock:
    """Seconds of each step, from when steps are scheduled and when their results come, both in order."""

    def __init__(self) -> None:
        self._scheduled_s: deque[float] = deque()
        self._ended_s = 0.0

    def schedule(self, now: float) -> None:
        """A step is scheduled."""
        self._scheduled_s.append(now)

    def complete(self, now: float) -> float:
        """The oldest step under way is over: the seconds that it took; 0 where none was."""
        began_s = max(self._scheduled_s.popleft() if self._scheduled_s else now, self._ended_s)
        self._ended_s = now
        return now - began_s
