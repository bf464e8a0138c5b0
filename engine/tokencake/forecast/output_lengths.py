"""Output lengths of recent calls by role, and their quantiles."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from tokencake.forecast.fair_lru import FairLRU

if TYPE_CHECKING:
    from tokencake.forecast.roles import Role

_KEPT: Final = 64
"""Answers remembered of each role."""

_ROLES: Final = 4_096
_ENOUGH: Final = 4
"""Answers before a role's own history counts."""


class OutputLengthHistory:
    """Recent output lengths in tokens, by role; bounded, and shared fairly between tenants."""

    def __init__(self) -> None:
        self._recent: FairLRU[Role, deque[int]] = FairLRU(_ROLES)

    def learn(self, role: Role, tokens: int) -> None:
        """Note a complete answer."""
        recent = self._recent.get(role) or deque[int](maxlen=_KEPT)
        recent.append(tokens)
        self._recent.put(role, recent, role.tenant)

    def quantile(self, role: Role, q: float) -> int | None:
        """The length that `q` of the answers in this role did not exceed; None while too few are known."""
        recent = self._recent.get(role)
        if recent is None or len(recent) < _ENOUGH:
            return None
        ordered = sorted(recent)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
