"""Events that each tenant may report: a token bucket, so that a flood of one costs the others' calls little."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from tokencake.protocol import MAX_EVENTS

if TYPE_CHECKING:
    from collections.abc import Callable

_BURST_S: Final = 10.0
"""So many seconds' worth may come at once, and in any case what one body may hold."""
_MAX_TENANTS: Final = 4_096


class EventBudget:
    """What each tenant has left. A tenant that was not heard of for longest is forgotten, and may start afresh.

    Args:
        per_s: events in a second.
        clock: seconds that never go back.
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = max(_BURST_S * per_s, MAX_EVENTS)
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Of each tenant: events, and as of when."""

    def take(self, tenant: str, count: int) -> float:
        """Take `count` events; returns 0, or without taking any, in how many seconds they may come."""
        now = self._clock()
        left, at_s = self._left.pop(tenant, (self._burst, now))
        left = min(self._burst, left + self._per_s * (now - at_s))
        missing = min(count, self._burst) - left
        self._left[tenant] = (left if missing > 0 else left - count, now)
        if len(self._left) > _MAX_TENANTS:
            self._left.popitem(last=False)
        return max(0.0, missing / self._per_s)
