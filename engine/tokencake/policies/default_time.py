"""Default offload policy: costs in seconds of copying, recomputing and waiting.

Stores whatever may be used again, copies nothing for a gap too short to pay, drops what nothing will extend. A copy to
the host runs beside the computation; recomputing runs on it and costs far more.
"""

from __future__ import annotations

from typing import Final

from tokencake.forecast.costs import CostModel
from tokencake.forecast.durations import DurationDistribution
from tokencake.time_scheduler.policy import MIN_REUSE_PROBABILITY, FinishedRequest, OffloadDecision
from tokencake.time_scheduler.settings import TimeSettings

MIN_USE: Final = 0.8
"""An upload is started where it is used with at least this probability; most are surer."""


class DefaultTimePolicy:
    """Why: lowest cost. Reads: hint, forecast, queue. Costs: one dictionary operation per block and request."""

    waits_for_demand = False
    restores_preempted = True
    counts_whole_prompts = False

    def on_finish(self, request: FinishedRequest, costs: CostModel, settings: TimeSettings) -> OffloadDecision:
        """In seconds: the gap until the blocks are used again, against copying them out and in."""
        if request.claim is not None:
            return OffloadDecision("drop", request.claim)
        gap_s = request.remaining.quantile(0.9) + request.queue_s
        round_trip_s = costs.store_s(request.missing) + costs.load_s(request.missing)
        if gap_s <= max(settings.short_stall_s, round_trip_s):
            # Beside it another request of this size must still find room, or the pins would only be in the way.
            is_in_budget = request.pinned_blocks + request.blocks <= settings.keep_share * request.device_blocks
            has_room = is_in_budget and request.free_blocks >= request.blocks and not request.waiting_calls
            if has_room:
                return OffloadDecision("keep", "short")
            # Where others wait for the room, what is not on the host is lost.
            if not request.missing or (gap_s <= request.residency_s and not request.waiting_calls):
                return OffloadDecision("leave", "short")
        if not request.missing:
            return OffloadDecision("offload", "on host already")
        if costs.recompute_s(request.missing) <= round_trip_s:
            return OffloadDecision("leave", "recompute is cheaper")
        return OffloadDecision("offload", "reusable")

    def upload_in_s(
        self, remaining: DurationDistribution, blocks: int, costs: CostModel, settings: TimeSettings
    ) -> float:
        """The early quantile of the return, less the copy and a margin."""
        lead_s = max(settings.upload_lead_s, 1.25 * costs.load_s(blocks))
        return max(0.0, remaining.quantile(settings.upload_quantile) - lead_s)

    def may_upload(self, remaining: DurationDistribution, probability: float, residency_s: float) -> bool:
        """Only what will probably be there still when the agent is back."""
        return probability >= MIN_REUSE_PROBABILITY and probability * remaining.cdf(residency_s) >= MIN_USE
