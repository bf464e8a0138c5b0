"""How long will an answer be? What the same agent's answers have been, as quantiles over the recent ones."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

_KEPT: Final = 64
"""Answers remembered of each agent."""

_AGENTS: Final = 4_096
_ENOUGH: Final = 4
"""Answers before an agent's own history counts."""


class AnswerLengths:
    """Recent lengths, in tokens, of each agent's answers; bounded, the agent unseen for longest is forgotten."""

    def __init__(self) -> None:
        self._recent: OrderedDict[str, deque[int]] = OrderedDict()

    def learn(self, agent: str, tokens: int) -> None:
        """Note a complete answer."""
        recent = self._recent.setdefault(agent, deque(maxlen=_KEPT))
        recent.append(tokens)
        self._recent.move_to_end(agent)
        if len(self._recent) > _AGENTS:
            self._recent.popitem(last=False)

    def quantile(self, agent: str, share: float) -> int | None:
        """The length that `share` of the agent's answers did not exceed; None while too few are known."""
        recent = self._recent.get(agent)
        if recent is None or len(recent) < _ENOUGH:
            return None
        ordered = sorted(recent)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
