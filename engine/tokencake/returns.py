"""Will anybody extend what this call left?

A hint says what the graph allows: of three branches that end in a join, the prompt behind it begins with one at most.
So it is counted for each role how often the next call has come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tokencake.fair_lru import FairLRU
from tokencake.roles import Role, role_of

if TYPE_CHECKING:
    from tokencake.protocol import Hint

FADE: Final = 0.9
"""Weight of the past at each new observation: about the last ten count."""
PRIOR_WEIGHT: Final = 1.0
"""What the hint says counts like so many observations."""
SAID: Final = 1.0
"""Chance where the hint says that the call will be extended."""
UNSAID: Final = 0.5
MAX_KEYS: Final = 4_096


@dataclass(slots=True)
class Returns:
    """How often calls were extended, by role. In bounded memory."""

    _seen: FairLRU[Role, tuple[float, float]] = field(default_factory=lambda: FairLRU(MAX_KEYS))
    """Weight of all observations, and of those in which the next call came."""

    def learn(self, hint: Hint | None, *, came: bool) -> None:
        """A stall is over: the next call came, or it never will."""
        if hint is None:
            return
        key = role_of(hint)
        seen, returned = self._seen.get(key) or (0.0, 0.0)
        self._seen.put(key, (seen * FADE + 1.0, returned * FADE + came), key.tenant)

    def chance(self, hint: Hint | None) -> float:
        """With this probability the call will be extended."""
        prior = SAID if hint is not None and hint.reuse == "extends" else UNSAID
        seen, returned = (self._seen.get(role_of(hint)) if hint is not None else None) or (0.0, 0.0)
        return (returned + prior * PRIOR_WEIGHT) / (seen + PRIOR_WEIGHT)
