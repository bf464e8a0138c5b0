"""Probability that a later call extends the prefix of a finished one, learned by role.

A hint only says what the graph allows: of three branches that end in a join, the prompt after the join extends at most
one. So for each role the share of calls that were extended is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from tokencake.forecast.fair_lru import FairLRU
from tokencake.forecast.roles import Role, role_of

if TYPE_CHECKING:
    from tokencake.protocol import Hint

Claim: TypeAlias = Literal["final", "over"]
"""Why no call should come: the last one said so, or its session has ended."""

FADE: Final = 0.9
"""Weight of the past at each new observation: about the last ten count."""
PRIOR_WEIGHT: Final = 1.0
"""Weight of the prior, in observations."""
PRIOR_DECLARED: Final = 1.0
"""Prior where the hint declares `reuse: extends`."""
PRIOR_UNDECLARED: Final = 0.5
PRIOR_CLAIMED: Final = 0.0
"""Prior under a claim that the call will not be extended."""
MAX_BELIEVED: Final = 0.1
"""A claim is believed where the learned probability is below this."""
MAX_KEYS: Final = 4_096


@dataclass(slots=True)
class ReuseProbability:
    """Share of calls that were extended, by role. In bounded memory."""

    _seen: FairLRU[tuple[Role, Claim | None], tuple[float, float]] = field(default_factory=lambda: FairLRU(MAX_KEYS))
    """Weight of all observations, and of those in which the next call came."""

    def learn(self, hint: Hint | None, *, came: bool, claim: Claim | None = None) -> None:
        """A stall is over, or a claim was made: whether the next call came."""
        if hint is not None:
            self._learn(role_of(hint), claim, came=came)

    def refute(self, role: Role, claim: Claim) -> None:
        """The next call came although `claim` had been made."""
        self._learn(role, claim, came=True)

    def _learn(self, role: Role, claim: Claim | None, *, came: bool) -> None:
        key = role, claim
        seen, returned = self._seen.get(key) or (0.0, 0.0)
        self._seen.put(key, (seen * FADE + 1.0, returned * FADE + came), role.tenant)

    def probability(self, hint: Hint | None, claim: Claim | None = None) -> float:
        """The probability that the call will be extended; with a `claim`, given that claim."""
        prior = (
            PRIOR_CLAIMED
            if claim is not None
            else PRIOR_DECLARED
            if hint is not None and hint.reuse == "extends"
            else PRIOR_UNDECLARED
        )
        seen, returned = (self._seen.get((role_of(hint), claim)) if hint is not None else None) or (0.0, 0.0)
        return (returned + prior * PRIOR_WEIGHT) / (seen + PRIOR_WEIGHT)

    def is_believed(self, hint: Hint | None, claim: Claim) -> bool:
        """Whether such claims have been true."""
        return self.probability(hint, claim) < MAX_BELIEVED
