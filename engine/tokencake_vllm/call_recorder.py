"""The component that keeps the registry: which hinted calls wait, run and end, and the tenant of each request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from tokencake import protocol
from tokencake_vllm.component import SchedulerComponent, TaggedRequest
from tokencake_vllm.vllm_adapter.requests import first_slots, is_aborted

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from tokencake.protocol import Hint
    from tokencake.registry.registry import Registry
    from tokencake_vllm.tenant_secret import TenantSecret

logger = init_logger("vllm.tokencake")


class CallRecorder(SchedulerComponent):
    """Writes into `registry` what becomes of each hinted call in `scheduler`.

    Args:
        scheduler: vLLM's.
        registry: the records.
        tenant_secret: what proves a tenant; None where tenants are not kept apart.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, tenant_secret: TenantSecret | None) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._tenant_secret = tenant_secret

    def tag(self, request: Request, now: float) -> TaggedRequest:
        """Parse the hint of a new request and enter its call."""
        hint = self._parsed_hint(request)
        if hint is not None:
            is_kept = self._registry.add_call(request.request_id, hint, request.num_prompt_tokens, now)
            self._registry.counts["hints", "accepted" if is_kept else "refused"] += 1
            hint = self._registry.hint_of(request.request_id)  # of several requests of one call the first one's counts
        if hint is not None:
            return TaggedRequest(request, hint, hint.tenant)
        return TaggedRequest(request, None, self.salted_tenant(request) or "")

    def salted_tenant(self, request: Request) -> str | None:
        """The tenant that the request's `cache_salt` proves; None where it proves none."""
        return (
            None if self._tenant_secret is None else self._tenant_secret.tenants().prefix_from_salt(request.cache_salt)
        )

    def _parsed_hint(self, request: Request) -> Hint | None:
        params, counts = request.sampling_params, self._registry.counts
        text = (params.extra_args or {}).get(protocol.HINT_KEY) if params is not None else None
        if text is None:
            counts["hints", "absent"] += 1
            return None
        try:
            return protocol.parse_hint(text, None if self._tenant_secret is None else self._tenant_secret.tenants())
        except protocol.UnmarkedError as error:
            counts["hints", "unmarked"] += 1
            logger.debug("TokenCake: the hint of request %s does not count: %s", request.request_id, error)
        except protocol.ProtocolError as error:
            counts["hints", "void"] += 1
            logger.debug("TokenCake: request %s has a void hint: %s", request.request_id, error)
        return None

    def after_step(self, output: SchedulerOutput, now: float) -> None:
        """Record the requests that got their first slot."""
        for request_id, device_tokens, host_tokens in first_slots(self._scheduler, output):
            self._registry.schedule_call(request_id, device_tokens, host_tokens, now)

    def after_preempt(self, request: Request) -> None:
        """Record the preemption."""
        self._registry.preempt_call(request.request_id)

    def before_free(self, request: Request, now: float) -> None:
        """Record the end of the request."""
        self._registry.finish_call(
            request.request_id, request.num_output_tokens, is_aborted=is_aborted(request), now=now
        )
