"""Tenants of the live calls: service received and statistics learned from their own calls.

A tenant's statistics come from its own calls alone: what another runs, or claims, does not change them. Where tenants
are not kept apart there is one, without a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tokencake.forecast.graph_stats import GraphStats, GraphStatsMemory
from tokencake.protocol import Graph

_MAX_KEPT: Final = 8_192
_FIRST_TOKEN_S: Final = 0.02
"""Seconds per output token until the first call has ended."""
_LEARNING_RATE: Final = 0.1


@dataclass(slots=True)
class Tenant:
    """The holder of one API key. `served_s` is in device-seconds."""

    id: str
    """The prefix of its ids; empty where tenants are not kept apart."""
    graph_stats: GraphStats
    served_s: float = 0.0
    live_calls: int = 0
    longest_wait_s: float = 0.0
    """Of its calls that have started, in seconds."""
    token_s: float = _FIRST_TOKEN_S
    """Fading mean of a call's seconds per output token."""

    def learn_call(self, took_s: float, output_tokens: int) -> None:
        """Record the duration and the output length of one call."""
        self.token_s += _LEARNING_RATE * (took_s / max(1, output_tokens) - self.token_s)


class TenantTable:
    """The tenants, bounded: one that has no call in the engine is forgotten where there are too many."""

    def __init__(self, graph_named: Callable[[str], Graph | None]) -> None:
        self._graph_named = graph_named
        self._memory = GraphStatsMemory()
        self._tenants: dict[str, Tenant] = {}

    def arrive(self, name: str) -> Tenant:
        """A call of this tenant arrives. After idling it resumes with the service of the least-served active tenant."""
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
        """Of the calls of this tenant that have started; 0 where the tenant is not known."""
        known = self._tenants.get(name)
        return 0.0 if known is None else known.longest_wait_s

    def forget(self, tenant: Tenant) -> None:
        """An application of it is forgotten; so is the tenant, where there are too many."""
        if len(self._tenants) > _MAX_KEPT and not tenant.live_calls:
            self._tenants.pop(tenant.id, None)
