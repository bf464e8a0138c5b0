"""Settings of the Space Scheduler: the section `space` of `--additional-config '{"tokencake": {"space": {...}}}'`.

All but those in `PUBLIC` stand under `advanced`. The defaults are measured in docs/space-scheduler.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokencake.protocol.parsing import SECONDS, count, flag, number, one_of, optional, text
from tokencake.protocol.tenancy import TENANT_SEPARATOR


@dataclass(frozen=True, slots=True)
class SpaceSettings:
    """The section `space`. A device-second is a share of the KV blocks held, times seconds."""

    PUBLIC: ClassVar = frozenset({"enabled", "policy", "head_start_s", "swap", "tenant_mark", "tenants_share_prefixes"})

    enabled: bool = optional(flag, True)
    """Off: every step is that of stock vLLM."""
    policy: str = optional(text(), "default")
    """A name in `tokencake.policies.registry.ADMISSION`; `paper` is the published scheduler."""
    head_start_s: float = optional(SECONDS, 300.0)
    """How much later than a long application a short one may come and still go first; the same again for each
    `long_s` that an application has had."""
    swap: bool = optional(flag, True)
    """Whether running requests may be swapped out to the host for a request of a more senior application."""
    tenant_mark: Literal["::"] | None = optional(one_of(TENANT_SEPARATOR))
    """What `tokencake proxy --tenants` puts behind the tenant in an id, `::`: then only what that proxy has marked
    counts. None: all clients are one tenant."""
    tenants_share_prefixes: bool = optional(flag, False)
    """Whether requests without the proxy's salt read cached prefixes: as with its `--tenants-share-prefixes`."""

    short_s: float = optional(number(0, 1e6), 1.5)
    """Device-seconds under which an application is short, those that are known to come included."""
    long_s: float = optional(number(1e-3, 1e6), 300.0)
    """Device-seconds that cost an application one more head start."""
    sibling_s: float = optional(SECONDS, 300.0)
    """Boost in seconds for a request whose prompt is mostly held by running requests."""
    importance_s: float = optional(SECONDS, 10.0)
    """Seniority for each point of `importance` above the mean of the tenant's own live requests."""
    critical_s: float = optional(SECONDS, 200.0)
    """Seniority of an application that has a critical path over one that has none, above the same mean."""
    tenant_quantum_s: float = optional(number(1e-3, 1e6), 2.0)
    """Device-seconds that one tenant may be ahead of another before the other's requests go first."""
    guarded: int = optional(count(1_000), 4)
    """Number of blocked requests at the head of the queue whose start backfilling must not delay, as far as can be
    foreseen; 0 disables backfilling: the queue waits for its head."""
    pass_s: float = optional(SECONDS, 20.0)
    """How long the head of the queue may be bypassed while it does not fit; after that nothing starts before it."""
    swap_oldest: int = optional(count(1_000), 2)
    """Number of the most senior applications for which running requests may be swapped out; 0: none."""
    swap_from: int = optional(count(1_000), 4)
    """Number of the most senior applications whose requests are never swapped out."""
    swap_share: float = optional(number(0, 1), 0.3)
    """Of all blocks: no swap for a request that needs less; it finds room soon."""
    swaps_per_call: int = optional(count(1_000), 4)
    """How often one request may be swapped out."""
    swap_patience_tokens: int = optional(count(100_000), 64)
    """A request within this many tokens of its expected end is waited for rather than swapped out."""
    answer_quantile: float = optional(number(0, 1), 0.8)
    """Quantile of an agent's recent output lengths that admission expects."""
    scan: int = optional(count(100_000), 64)
    """Waiting requests examined for shared prefixes, and blocked requests bypassed, in one step."""
    decisions: int = optional(count(100_000), 1_000)
    """Entries of the decision log."""
