"""The rate limit on events: a token bucket for each tenant, so that one tenant's flood costs the others little."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from tokencake.bounded import BoundedDict
from tokencake.protocol import MAX_EVENTS

if TYPE_CHECKING:
    from collections.abc import Callable

_BURST_S: Final = 10.0
"""The bucket holds the events of this many seconds, and at least `MAX_EVENTS`, the most that one body may hold."""
_MAX_TENANTS: Final = 4_096


class EventBudget:
    """The remaining events of each tenant. Beyond `_MAX_TENANTS` the least recent one is dropped and starts full again.

    Args:
        per_s: events per second.
        clock: seconds, monotonic.
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = max(_BURST_S * per_s, MAX_EVENTS)
        self._clock = clock
        self._left: BoundedDict[str, tuple[float, float]] = BoundedDict(_MAX_TENANTS)
        """Tenant -> (remaining events, time of that count)."""

    def take(self, tenant: str, count: int) -> float:
        """Take `count` events and return 0; or take none and return the seconds until they are available."""
        now = self._clock()
        left, at_s = self._left.get(tenant, (self._burst, now))
        left = min(self._burst, left + self._per_s * (now - at_s))
        missing = min(count, self._burst) - left
        self._left[tenant] = (left if missing > 0 else left - count, now)
        return max(0.0, missing / self._per_s)
