"""Seniority: the order of calls by application, with a virtual start time that is shifted by bounded amounts.

Seniority is a time on the engine's clock, earlier goes first: when the application was first seen here, shifted by
bounded amounts. So a waiting call is overtaken only by applications that arrived before a fixed time, and by each of
them only until it has had its service: no call starves. Inside an application the longest remaining path goes first.

    seniority_s = first seen
                + head_start_s x level        level 0: with what is known to come it will have had less than `short_s`
                                              1 + served / `long_s`, rounded down: every other
                - sibling_s                   if running calls hold most of its prompt
                - (boost - mean boost of its tenant's live calls)
    boost       = importance_s x importance + critical_s if its application has a critical path

Calls without a hint stay in the order of their arrival: they have one level, that of the mean of them, and no
`sibling_s`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake.space_scheduler.applications import Application, LiveRequest
    from tokencake.space_scheduler.settings import SpaceSettings
    from tokencake.space_scheduler.tenant_table import Tenant

DEFAULT_IMPORTANCE = 5.0
"""Of a call without a claimed importance; the middle of the range."""


@dataclass(frozen=True, slots=True)
class RankContext:
    """What a call is compared with; the same for all calls of one step."""

    tenant_levels: dict[str, int]
    """Of each active tenant: quanta of service beyond the least served tenant."""
    mean_boosts_s: dict[str, float]
    """Mean priority boost of each tenant's live calls."""
    unhinted_levels: dict[str, int]
    """Service level of each tenant's calls without a hint."""


def rank_context(
    calls: Iterable[LiveRequest], tenants: list[Tenant], settings: SpaceSettings, total_tokens: int
) -> RankContext:
    """`RankContext` of the live `calls`, whose tenants are `tenants`, on a device that holds `total_tokens`."""
    least = min((tenant.served_s for tenant in tenants), default=0.0)
    tenant_levels = {tenant.id: int((tenant.served_s - least) / settings.tenant_quantum_s) for tenant in tenants}
    mean_boosts_s, unhinted_s = defaultdict[str, float](float), defaultdict[str, float](float)
    unhinted = Counter[str]()
    for call in calls:
        tenant = call.app.tenant
        if call.hint is None:
            unhinted[tenant.id] += 1
            unhinted_s[tenant.id] += call.prompt_tokens / total_tokens * call.expected_tokens * tenant.token_s
        mean_boosts_s[tenant.id] += priority_boost_s(call, settings)
    means = {tenant.id: mean_boosts_s[tenant.id] / max(1, tenant.live_calls) for tenant in tenants}
    unhinted_levels = {name: int(unhinted_s[name] > settings.short_s * count) for name, count in unhinted.items()}
    return RankContext(tenant_levels, means, unhinted_levels)


def priority_boost_s(call: LiveRequest, settings: SpaceSettings) -> float:
    """Priority boost claimed by the client, in seconds, before the mean of its tenant is taken off."""
    hint = call.hint
    importance = DEFAULT_IMPORTANCE if hint is None or hint.importance is None else hint.importance
    return settings.importance_s * importance + (settings.critical_s if call.app.is_critical else 0.0)


def service_level(app: Application, expected_service_s: float, settings: SpaceSettings) -> int:
    """Level of the service received; `expected_service_s` device-seconds are expected to come.

    An application that claims to be short is believed until it has had `short_s`.
    """
    if app.served_s + expected_service_s < settings.short_s:
        return 0
    return 1 + int(app.served_s / settings.long_s)


def expected_service_s(call: LiveRequest, share: float) -> float:
    """Device-seconds that its application is expected to use; the call needs this `share` of the blocks."""
    return share * max(call.expected_tokens * call.app.tenant.token_s, call.service_s)


def seniority_s(
    call: LiveRequest, settings: SpaceSettings, context: RankContext, *, share: float, shares_prefix: bool
) -> float:
    """The formula above.

    Args:
        call: waiting or running.
        settings: the amounts.
        context: of this step.
        share: of all KV blocks that the call needs.
        shares_prefix: whether running calls hold most of its prompt.
    """
    app = call.app
    if call.hint is None:
        level, shares_prefix = context.unhinted_levels.get(app.tenant.id, 0), False
    else:
        level = service_level(app, expected_service_s(call, share), settings)
    return (
        app.first_seen_s
        + settings.head_start_s * level
        - (settings.sibling_s if shares_prefix else 0.0)
        - (priority_boost_s(call, settings) - context.mean_boosts_s.get(app.tenant.id, 0.0))
    )
