"""What can be set of the Space Scheduler? The section `space` of `--additional-config '{"tokencake": {...}}'`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokencake.protocol.parsing import SECONDS, count, flag, number, one_of, optional
from tokencake.protocol.tenancy import TENANT_SEPARATOR


@dataclass(frozen=True, slots=True)
class SpaceSettings:
    """Device-seconds: the share of the KV blocks held, times seconds. The defaults are measured in docs/bench.md."""

    enabled: bool = optional(flag, True)
    """Off: every step is that of stock vLLM."""
    policy: Literal["ours", "paper"] = optional(one_of("ours", "paper"), "ours")

    head_start_s: float = optional(SECONDS, 300.0)
    """How much later than a long application a short one may come and still go first; so often again for each
    `long_s` that an application has had."""
    short_s: float = optional(number(0, 1e6), 1.5)
    """Device-seconds under which an application is short, those that are known to come included."""
    long_s: float = optional(number(1e-3, 1e6), 300.0)
    """Device-seconds that cost an application one more head start."""
    sibling_s: float = optional(SECONDS, 300.0)
    """How much later an application may have come whose call finds most of its prompt held by running calls."""
    importance_s: float = optional(SECONDS, 10.0)
    """Seniority for each point of `importance` above the mean of the tenant's own calls."""
    critical_s: float = optional(SECONDS, 200.0)
    """Seniority of an application that has a critical path over one that nobody waits for, above the same mean."""
    tenant_quantum_s: float = optional(number(1e-3, 1e6), 2.0)
    """Device-seconds that one tenant may be ahead of another before the other's calls go first."""
    tenant_mark: Literal["::"] | None = optional(one_of(TENANT_SEPARATOR))
    """What `tokencake proxy --tenants` puts behind the tenant in an id, `::`: then only what that proxy has marked
    counts. None: all clients are one tenant."""
    tenants_share_prefixes: bool = optional(flag, False)
    """Whether requests without the proxy's salt read cached prefixes: as with its `--tenants-share-prefixes`."""

    guarded: int = optional(count(1_000), 4)
    """So many of the first calls that do not fit are not delayed by those that pass them, as far as can be foreseen;
    0: whoever does not fit is waited for, and nobody passes."""
    pass_s: float = optional(SECONDS, 20.0)
    """How long others may pass the first in line while it does not fit; from then on nobody starts before it does."""
    swap_oldest: int = optional(count(1_000), 2)
    """So many of the most senior applications may have calls of young ones swapped out to the host; 0: none."""
    swap_from: int = optional(count(1_000), 4)
    """So many of the most senior applications are not swapped out."""
    swap_share: float = optional(number(0, 1), 0.3)
    """Of all blocks: nobody is swapped out for a call that needs less; it finds room soon."""
    swaps_per_call: int = optional(count(1_000), 4)
    """How often one call may be swapped out."""
    swap_patience_tokens: int = optional(count(100_000), 64)
    """Tokens of its answer within which a call is waited for rather than swapped out."""
    answer_quantile: float = optional(number(0, 1), 0.8)
    """Of an agent's recent answers: the length to be reckoned with."""
    scan: int = optional(count(100_000), 64)
    """Waiting calls looked at for shared prefixes, and refused ones passed over, in one step."""
    decisions: int = optional(count(100_000), 1_000)
    """Entries of the decision log."""
