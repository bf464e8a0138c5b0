"""May this waiting call run in this step, given those that run and those let through before it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from tokencake.space_scheduler.growth import Promise
from tokencake.space_scheduler.policy import REFUSALS, Memory
from tokencake_vllm.vllm_adapter.requests import ADMISSIBLE

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from tokencake.registry.registry import Registry
    from tokencake.space_scheduler.applications import Applications, LiveCall
    from tokencake.space_scheduler.explain import SpaceWords
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
        applications: Applications,
        view: BlockView,
        words: SpaceWords,
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
        self._words = words
        self._registry = registry
        self._contain_errors = contain_errors
        self._has_logged_undeclared = False
        self.reset()

    def reset(self) -> None:
        """The step is over."""
        self._promises: list[Promise] | None = None
        self._taken: list[tuple[LiveCall, int]] = []
        self._tried: tuple[Request, LiveCall, int] | None = None
        self._passed: list[int] = []
        self._has_passed_critical = False
        self._has_passed_plain = False
        self._is_closed = False

    def admits(self, request: Request, call: LiveCall, admitted: Callable[[], list[Request]], now: float) -> bool:
        """Whether `request` may try to get its blocks; `admitted` names those that have theirs."""
        if len(self._passed) >= self._settings.scan:
            return False
        self._settle_tried(admitted)
        need = self._view.needed_blocks(request)
        reason = self._policy.refusal(call, need, self.memory())
        if reason is None:
            self._tried = request, call, need
            return True
        with self._contain_errors:  # what goes wrong here does not let it in
            self._passed.append(need)
            self._has_passed_critical |= call.app.is_critical
            self._has_passed_plain |= call.hint is None
            if len(self._passed) == 1:  # the most senior of those that could not run
                call.refused_s = now if call.refused_s is None else call.refused_s
                self._is_closed = now - call.refused_s > self._settings.pass_s
            self._note(call, self._declared(reason), need, now)
        return False

    def note_reserved(self, request: Request, call: LiveCall, now: float) -> None:
        """`request` was not asked for: what is free was given up for another call."""
        with self._contain_errors:
            self._note(call, "kept", self._view.needed_blocks(request), now)

    def _note(self, call: LiveCall, reason: Refusal, need: int, now: float) -> None:
        self._registry.counts["space_refusals", reason] += 1
        self._words.note_refused(call, reason, need, self._view.free_blocks, now)

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
        """Whom the gate let through last: if vLLM gave it its blocks, they are promised."""
        if self._promises is None:
            self._promises = [self.promise(request) for request in admitted()]
        elif self._tried is not None and self._tried[0].status not in ADMISSIBLE:
            request, call, need = self._tried
            self._promises.append(self.promise(request))
            self._taken.append((call, need))
        self._tried = None

    def memory(self) -> Memory:
        """The blocks as of now."""
        return Memory(
            total_blocks=self._view.total_blocks,
            free_blocks=self._view.free_blocks,
            block_tokens=self._view.block_tokens,
            promises=tuple(self._promises or ()),
            has_passed_critical=self._has_passed_critical,
            has_passed_plain=self._has_passed_plain,
            is_closed=self._is_closed,
            passed=tuple(self._passed),
            private_blocks=self.exclusive_blocks,
            taken=tuple(self._taken),
            step=self.step,
        )

    def promise(self, request: Request) -> Promise:
        """What an admitted request will yet take and give."""
        name = request.request_id
        pending = self._view.blocks_of(request.num_tokens) - self._view.allocated_blocks(name)
        return Promise(self.left_tokens(request), max(0, pending), self._view.exclusive_blocks(name))

    def left_tokens(self, request: Request) -> int:
        """Tokens that its answer will yet have, as far as can be foreseen."""
        call = self._applications.calls.get(request.request_id)
        expected = request.max_tokens if call is None else call.expected_tokens
        return max(1, expected - request.num_output_tokens)
