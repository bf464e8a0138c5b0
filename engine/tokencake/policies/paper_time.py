"""Published offload policy: copy only where a waiting request can use the room meanwhile (Algorithm 1, score)."""

from __future__ import annotations

from typing import Final

from tokencake.forecast.costs import CostModel
from tokencake.forecast.durations import DurationDistribution
from tokencake.time_scheduler.policy import FinishedRequest, OffloadDecision, PaperInputs, PaperReason
from tokencake.time_scheduler.settings import TimeSettings

LOW_PRESSURE: Final = 0.60
EMERGENCY_USE: Final = 0.85
EMERGENCY_S: Final = 5.0
MIN_WINDOW_S: Final = 0.05
MIN_SCORE: Final = 1.0
PROTECTED_IMPORTANCE: Final = 8.0
PAPER_LEAD_S: Final = 0.1
PAPER_LEAD_TIMES: Final = 1.25


class PaperTimePolicy:
    """Why: to compare. Reads: the predicted stall, pressure, the waiting requests that could be admitted.

    Costs: one walk over the head of the queue per decision.
    """

    waits_for_demand = True
    restores_preempted = False
    counts_whole_prompts = True

    def on_finish(self, request: FinishedRequest, costs: CostModel, settings: TimeSettings) -> OffloadDecision:  # noqa: ARG002  # the interface
        """Reject reasons in the published order."""
        if request.claim is not None or not request.blocks:
            return OffloadDecision("leave", "not eligible")
        if not request.missing:
            return OffloadDecision("offload", "on host already")
        inputs = request.paper_inputs()
        stall_s = request.remaining.mean_s
        transfer_s = costs.store_s(request.missing) + costs.load_s(request.blocks)
        window_s = stall_s - transfer_s
        use = 1.0 - request.free_blocks / max(1, request.device_blocks)
        has_window = window_s >= max(4 * transfer_s, EMERGENCY_S)
        is_emergency = use >= EMERGENCY_USE and has_window and request.waiting_calls > 0
        why = self._rejection(request, inputs, stall_s, transfer_s, use, is_emergency=is_emergency)
        if why is None and not is_emergency and self.score(request, inputs, stall_s, transfer_s, use) < MIN_SCORE:
            why = "score"
        return (
            OffloadDecision("offload", "emergency" if is_emergency else "pays")
            if why is None
            else OffloadDecision("leave", why)
        )

    @staticmethod
    def _rejection(
        request: FinishedRequest,
        inputs: PaperInputs,
        stall_s: float,
        transfer_s: float,
        use: float,
        *,
        is_emergency: bool,
    ) -> PaperReason | None:
        window_s = stall_s - transfer_s
        has_queue_pressure = inputs.waiting_blocks > request.free_blocks
        is_shielded = inputs.importance >= PROTECTED_IMPORTANCE and not is_emergency
        checks: tuple[tuple[bool, PaperReason], ...] = (
            (not inputs.fitting_blocks, "no waiting demand"),
            (inputs.host_free < request.missing, "host is full"),
            (stall_s <= transfer_s, "stall too short"),
            (window_s < max(MIN_WINDOW_S, 2 * transfer_s) and not is_emergency, "window too short"),
            (
                use < LOW_PRESSURE
                and (not has_queue_pressure or inputs.fitting_blocks < request.blocks or not request.waiting_calls),
                "low pressure",
            ),
            (
                is_shielded and (inputs.is_near_end or window_s < max(0.5, 8 * transfer_s) or stall_s < 2 * transfer_s),
                "important",
            ),
        )
        return next((why for is_rejected, why in checks if is_rejected), None)

    @staticmethod
    def score(request: FinishedRequest, inputs: PaperInputs, stall_s: float, transfer_s: float, use: float) -> float:
        """The published score; offload from `MIN_SCORE` on."""
        recent = inputs.recent_stores
        churn = min(4.0, (recent - 64) / 8) if recent > 64 else 0.0  # noqa: PLR2004  # published
        return (
            min(6.0, (stall_s - transfer_s) / max(0.25, transfer_s))
            + max(0.0, (use - LOW_PRESSURE) * 6)
            + min(2.0, inputs.waiting_blocks / (request.blocks + 1))
            + min(2.0, inputs.fitting_blocks / max(1, request.blocks))
            + (1.0 if stall_s >= 2 * transfer_s else -1.0)
            + (1.0 if inputs.host_free >= request.missing else -4.0)
            - 0.35 * min(10.0, inputs.importance)
            - (2.0 if inputs.is_near_end else 0.0)
            - churn
        )

    def upload_in_s(
        self,
        remaining: DurationDistribution,
        blocks: int,
        costs: CostModel,
        settings: TimeSettings,  # noqa: ARG002  # as above
    ) -> float:
        """The predicted return less `max(0.1 s, 1.25 T)`."""
        return max(0.0, remaining.mean_s - max(PAPER_LEAD_S, PAPER_LEAD_TIMES * costs.load_s(blocks)))

    def may_upload(self, remaining: DurationDistribution, probability: float, residency_s: float) -> bool:  # noqa: ARG002  # as above
        """Always."""
        return True
