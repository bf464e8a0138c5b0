"""Will anybody extend what this call left?

A hint says what the graph allows: of three branches that end in a join, the prompt behind it begins with one at most.
So it is counted for each node how often the next call has come.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

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


def place_of(hint: Hint) -> str:
    """The node that a call belongs to, or the agent where no node is known."""
    return f"{hint.graph or ''}/{hint.node}" if hint.node else hint.agent or ""


@dataclass(slots=True)
class Returns:
    """How often calls were extended, by graph and node, or by agent where no node is known. In bounded memory."""

    _seen: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    """Weight of all observations, and of those in which the next call came."""

    def learn(self, hint: Hint | None, *, came: bool) -> None:
        """A stall is over: the next call came, or it never will."""
        if hint is None:
            return
        key = place_of(hint)
        seen, returned = self._seen.pop(key, (0.0, 0.0))
        self._seen[key] = (seen * FADE + 1.0, returned * FADE + came)
        if len(self._seen) > MAX_KEYS:
            self._seen.popitem(last=False)

    def chance(self, hint: Hint | None) -> float:
        """With this probability the call will be extended."""
        prior = SAID if hint is not None and hint.reuse == "extends" else UNSAID
        seen, returned = self._seen.get(place_of(hint), (0.0, 0.0)) if hint is not None else (0.0, 0.0)
        return (returned + prior * PRIOR_WEIGHT) / (seen + PRIOR_WEIGHT)
