"""What clients and operators are told of the KV of a request: with its answer, and in the state of its session."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tokencake.forecast.durations import DurationDistribution
    from tokencake.registry.records import CallRecord
    from tokencake.time_scheduler.policy import OffloadDecision
    from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex
    from tokencake_vllm.transfer.host_cache import HostCache

SHOWN_PREFIXES: Final = 4
"""Prefixes of one session in the state, the newest ones."""


def with_answer(
    prefix: CachedPrefix,
    call: CallRecord | None,
    decision: OffloadDecision,
    stored: int,
    remaining: DurationDistribution,
) -> dict[str, Any]:
    """The report that goes back in `kv_transfer_params` of the answer; `docs/protocol.md` names its fields."""
    return {
        "decision": decision.action,
        "why": decision.why,
        "blocks": len(prefix.block_hashes),
        "stored_blocks": stored,
        "expected_stall_s": round(remaining.quantile(0.5), 3),
        "prefix_tokens": {"device": call.cached_device_tokens, "host": call.cached_host_tokens} if call else None,
        "queued_s": round(call.scheduled_s - call.arrived_s, 3) if call and call.scheduled_s is not None else None,
    }


def of_session(prefixes: PrefixIndex, cache: HostCache, session: str) -> list[dict[str, Any]]:
    """Where the KV of a session's newest calls is, in blocks."""
    newest = heapq.nlargest(SHOWN_PREFIXES, prefixes.of_session(session), key=lambda prefix: prefix.since_s)
    return [
        {
            "call": (prefix.hint.call if prefix.hint else None) or prefix.id,
            "phase": prefix.phase,
            "decision": prefix.outcome,
            "blocks": len(prefix.block_hashes),
            "on_device": cache.count_on_device(prefix.block_hashes),
            "on_host": cache.tier.loadable(prefix.block_hashes),
            "pinned": len(cache.pinned.get(prefix.id, ())),
        }
        for prefix in newest
    ]
