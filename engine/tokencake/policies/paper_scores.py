"""Published scores of a call and of an agent type (paper, equations 5 and 6).

Terms and weights are those of the authors' implementation. Ages are the engine's own, where theirs are the client's.
What their client computes from the graph comes from the hint here: importance is the depth where the user gives none,
`similarity` the inverse of the fan-out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokencake.space_scheduler.applications import LiveRequest


def request_score(call: LiveRequest, first_app_s: float, now: float) -> float:
    """Structure, synchronisation and ageing of one call; highest goes first.

    Args:
        call: waiting or running.
        first_app_s: when the first application was seen, from which offsets of applications count.
        now: on the engine's clock.
    """
    hint = call.hint
    if hint is None:
        return -1.0
    depth, fan_out = hint.depth or 0, max(1, hint.fan_out or 1)
    remaining, deepest = hint.remaining or 0, max(1, hint.max_depth or 1)
    similarity = 1.0 / fan_out
    depth_share, remaining_share = min(1.0, depth / deepest), min(1.0, remaining / deepest)
    elapsed_s, waited_s = now - call.app.first_seen_s, now - call.arrived_s
    structure = (
        100 * (depth if hint.importance is None else hint.importance)
        + 15 * depth
        + 45 * (hint.out_degree or 0)
        + 10 * (1 if depth > 1 else 0)
        + 20 * similarity
        + 20 * remaining
        + 4 * depth
    )
    synchronisation = (
        120 * (1 / similarity - 1)
        + 180 * (hint.critical is True)
        + 90 * (hint.remaining is not None and remaining <= 1)
        + 20 * (hint.join is not None)
        + 12 * (fan_out - 1)
    )
    ageing = (
        6 * min(call.app.first_seen_s - first_app_s, 60)
        + 5 * min(elapsed_s, 300) * (1 + 0.75 * remaining_share)
        + 8 * min(waited_s, 180) * (1 + 0.5 * remaining_share)
        + 5 * min(elapsed_s, 240) * depth_share
    )
    return structure + synchronisation + ageing


@dataclass(slots=True)
class AgentType:
    """Sums over the calls of one agent type, of which the score takes means."""

    calls: int = 0
    importance: float = 0.0
    depth: float = 0.0
    out_degree: float = 0.0
    remaining: float = 0.0
    elapsed_s: float = 0.0
    tokens: float = 0.0
    waited_s: float = 0.0
    waiting: int = 0
    refusals: int = 0
    preemptions: int = 0
    call_s: float = 0.0
    """Mean length of the calls of its tenant."""

    def score(self) -> float:
        """2 x importance + urgency + 0.5 x cost of computing again + place in the graph."""
        count, call_s = max(1, self.calls), self.call_s
        tokens = self.tokens / count
        urgency = (
            log1p(self.waited_s / max(1, self.waiting))
            + log1p(self.waiting)
            + log1p(self.refusals)
            + 1.5 * log1p(self.preemptions)
        )
        recompute = log1p(tokens) + log1p(call_s) + log1p(tokens / max(call_s, 1e-3))
        graph = (
            0.7 * self.depth / count
            + 0.5 * self.out_degree / count
            + 0.25 * (self.depth > count)
            + 0.20 * self.remaining / count
            + 0.10 * min(self.elapsed_s / count, 180)
        )
        return max(1.0, 2 * self.importance / count + urgency + 0.5 * recompute + graph)

    def note(self, call: LiveRequest, now: float) -> None:
        """Count a live call of this type in."""
        hint = call.hint
        if hint is None:
            return
        self.calls += 1
        self.call_s = call.app.tenant.graph_stats.call_s
        self.importance += (hint.depth or 0) if hint.importance is None else hint.importance
        self.depth += hint.depth or 0
        self.out_degree += hint.out_degree or 0
        self.remaining += hint.remaining or 0
        self.elapsed_s += now - call.app.first_seen_s
        self.tokens += call.prompt_tokens
        self.preemptions += call.preemptions
        if not call.is_running:
            self.waiting += 1
            self.waited_s += now - call.arrived_s
