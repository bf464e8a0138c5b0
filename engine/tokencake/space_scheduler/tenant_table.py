"""Tenants of the calls that wait and run: the service that each has had, and what its own calls have taught.

A tenant learns from its own calls alone: what another runs, or claims, changes nothing of what is expected of it. Where
tenants are not kept apart there is one, without a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tokencake.forecast.graph_stats import GraphStats, GraphStatsMemory
from tokencake.protocol import Graph

_MAX_KEPT: Final = 8_192
_FIRST_TOKEN_S: Final = 0.02
"""A token of an answer takes so long as far as is known before the first call has ended."""
_LEARNING_RATE: Final = 0.1


@dataclass(slots=True)
class Tenant:
    """All calls of the holder of one API key. `served_s` is lifted to its peers' on return."""

    id: str
    """The prefix of its ids; empty where tenants are not kept apart."""
    graph_stats: GraphStats
    served_s: float = 0.0
    live_calls: int = 0
    longest_wait_s: float = 0.0
    """Of its calls that have started."""
    token_s: float = _FIRST_TOKEN_S
    """Seconds that a call takes for each token of its answer, on average of late."""

    def learn_call(self, took_s: float, output_tokens: int) -> None:
        """A call of it took so long for so many tokens of an answer."""
        self.token_s += _LEARNING_RATE * (took_s / max(1, output_tokens) - self.token_s)


class TenantTable:
    """The tenants, bounded: one that has no call in the engine is forgotten where there are too many."""

    def __init__(self, graph_named: Callable[[str], Graph | None]) -> None:
        self._graph_named = graph_named
        self._memory = GraphStatsMemory()
        self._tenants: dict[str, Tenant] = {}

    def arrive(self, name: str) -> Tenant:
        """A call of this tenant comes. Time spent idle is no credit: it stands where the least served others stand."""
        tenant = self.get(name)
        if not tenant.live_calls:
            others = [other.served_s for other in self._tenants.values() if other.live_calls]
            tenant.served_s = max(tenant.served_s, min(others, default=0.0))
        return tenant

    def get(self, name: str) -> Tenant:
        """The tenant with this prefix."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(name, GraphStats(self._graph_named, self._memory, name))
        return tenant

    def active(self) -> list[Tenant]:
        """Those with a live call."""
        return [tenant for tenant in self._tenants.values() if tenant.live_calls]

    def longest_wait_s(self, name: str) -> float:
        """Of the calls of this tenant that have started, as far as it is remembered."""
        known = self._tenants.get(name)
        return 0.0 if known is None else known.longest_wait_s

    def forget(self, tenant: Tenant) -> None:
        """An application of it is forgotten; so is the tenant, where there are too many."""
        if len(self._tenants) > _MAX_KEPT and not tenant.live_calls:
            self._tenants.pop(tenant.id, None)
