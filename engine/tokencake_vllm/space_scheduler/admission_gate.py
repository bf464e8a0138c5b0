"""Admission gate: whether a waiting request may start in this step, beside those that run and were admitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from tokencake.space_scheduler.growth import GrowthReservation
from tokencake.space_scheduler.policy import REFUSALS, AdmissionState
from tokencake_vllm.vllm_adapter.requests import ADMISSIBLE

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from tokencake.registry.registry import Registry
    from tokencake.space_scheduler.applications import AppTracker, LiveRequest
    from tokencake.space_scheduler.explain import DecisionExplainer
    from tokencake.space_scheduler.policy import Refusal, SpacePolicy
    from tokencake.space_scheduler.settings import SpaceSettings
    from tokencake_vllm.component import ErrorContainment
    from tokencake_vllm.vllm_adapter.block_view import BlockView

logger = init_logger("vllm.tokencake")


class AdmissionGate:
    """Asks the policy, and keeps for it what has been promised and refused since the step began."""

    def __init__(
        self,
        settings: SpaceSettings,
        policy: SpacePolicy,
        applications: AppTracker,
        view: BlockView,
        explainer: DecisionExplainer,
        registry: Registry,
        contain_errors: ErrorContainment,
    ) -> None:
        self.exclusive_blocks: Mapping[str, int] = {}
        """By running request, as of the last ranking."""
        self.step = 0
        self._settings = settings
        self._policy = policy
        self._applications = applications
        self._view = view
        self._explainer = explainer
        self._registry = registry
        self._contain_errors = contain_errors
        self._has_logged_undeclared = False
        self.reset()

    def reset(self) -> None:
        """The step is over."""
        self._reservations: list[GrowthReservation] | None = None
        self._taken: list[tuple[LiveRequest, int]] = []
        self._tried: tuple[Request, LiveRequest, int] | None = None
        self._bypassed: list[int] = []
        self._has_bypassed_critical = False
        self._has_bypassed_unhinted = False
        self._bypass_expired = False

    def admits(self, request: Request, call: LiveRequest, admitted: Callable[[], list[Request]], now: float) -> bool:
        """Whether `request` may try to get its blocks; `admitted` names those that have theirs."""
        if len(self._bypassed) >= self._settings.scan:
            return False
        self._settle_tried(admitted)
        need = self._view.needed_blocks(request)
        reason = self._policy.refusal(call, need, self.state())
        if reason is None:
            self._tried = request, call, need
            return True
        with self._contain_errors:  # what goes wrong here does not let it in
            self._bypassed.append(need)
            self._has_bypassed_critical |= call.app.is_critical
            self._has_bypassed_unhinted |= call.hint is None
            if len(self._bypassed) == 1:  # the most senior of those that could not run
                call.first_skipped_s = now if call.first_skipped_s is None else call.first_skipped_s
                self._bypass_expired = now - call.first_skipped_s > self._settings.pass_s
            self._note(call, self._declared(reason), need, now)
        return False

    def note_reserved(self, request: Request, call: LiveRequest, now: float) -> None:
        """`request` was not asked for: what is free was given up for another call."""
        with self._contain_errors:
            self._note(call, "kept", self._view.needed_blocks(request), now)

    def _note(self, call: LiveRequest, reason: Refusal, need: int, now: float) -> None:
        self._registry.counts["space_refusals", reason] += 1
        self._explainer.note_skipped(call, reason, need, self._view.free_blocks, now)

    def _declared(self, reason: Refusal) -> Refusal:
        """`reason`, where it is one of `Refusal`: a policy of another author may give anything."""
        if isinstance(reason, str) and reason in REFUSALS:
            return reason
        if not self._has_logged_undeclared:
            self._has_logged_undeclared = True
            name = type(self._policy).__name__
            logger.error(
                "TokenCake: %s refuses calls with %r, which is no `tokencake.space_scheduler.policy.Refusal`",
                name,
                reason,
            )
        return "undeclared"

    def _settle_tried(self, admitted: Callable[[], list[Request]]) -> None:
        """Account for the request that was admitted last, if vLLM has given it blocks."""
        if self._reservations is None:
            self._reservations = [self.reservation(request) for request in admitted()]
        elif self._tried is not None and self._tried[0].status not in ADMISSIBLE:
            request, call, need = self._tried
            self._reservations.append(self.reservation(request))
            self._taken.append((call, need))
        self._tried = None

    def state(self) -> AdmissionState:
        """The blocks as of now."""
        return AdmissionState(
            total_blocks=self._view.total_blocks,
            free_blocks=self._view.free_blocks,
            block_tokens=self._view.block_tokens,
            reservations=tuple(self._reservations or ()),
            has_bypassed_critical=self._has_bypassed_critical,
            has_bypassed_unhinted=self._has_bypassed_unhinted,
            bypass_expired=self._bypass_expired,
            bypassed=tuple(self._bypassed),
            exclusive_blocks=self.exclusive_blocks,
            taken=tuple(self._taken),
            step=self.step,
        )

    def reservation(self, request: Request) -> GrowthReservation:
        """What an admitted request will yet take and give."""
        name = request.request_id
        pending = self._view.blocks_of(request.num_tokens) - self._view.allocated_blocks(name)
        return GrowthReservation(self.left_tokens(request), max(0, pending), self._view.exclusive_blocks(name))

    def left_tokens(self, request: Request) -> int:
        """Tokens that its answer will yet have, as far as can be foreseen."""
        call = self._applications.calls.get(request.request_id)
        expected = request.max_tokens if call is None else call.expected_tokens
        return max(1, expected - request.num_output_tokens)
