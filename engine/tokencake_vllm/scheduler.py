"""How does vLLM's own scheduler learn who calls? By a mixin that watches requests come, run and go.

`schedule()` is never copied. What the mixin does is advice: an exception in it is logged and counted, and the request
goes on as if the hint were absent. `SpaceMixin` orders the calls, `TimeMixin` moves their blocks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from tokencake import protocol
from tokencake.front_end import front_end_problem
from tokencake.registry.record_store import Limits
from tokencake.registry.registry import Registry
from tokencake.registry.state_view import state_view
from tokencake.settings import section
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake_vllm.space_scheduler.component import SpaceMixin
from tokencake_vllm.step_log import StepMixin
from tokencake_vllm.tenant_secret import TenantSecret
from tokencake_vllm.time_scheduler.component import TimeMixin
from tokencake_vllm.vllm_adapter.block_accounting import block_budget, own_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    _Base = Scheduler
else:
    _Base = object

logger = init_logger("vllm.tokencake")


_CLOCK_SET_S: Final = 1.0
"""A jump of the system's clock by more is taken over; smaller ones would shift the pages of a view in the reading."""
_FEW_BLOCKS: Final = 8_192
"""To look at so many takes the engine's loop two or three milliseconds."""
_COUNTED_S: Final = 1.0


class TokenCakeMixin(_Base):
    """Keeps a `Registry` of hinted calls beside a vLLM scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_async = bool(self.scheduler_config.async_scheduling)
        if is_async != isinstance(self, AsyncScheduler):
            raise RuntimeError(
                f"{type(self).__name__} does not fit async_scheduling={is_async}: pass --scheduler-cls "
                "tokencake_vllm.scheduler.create_scheduler, which picks the class that fits"
            )
        config = self.vllm_config.additional_config
        self.space = section(config, "space", SpaceSettings)
        has_tenants = self.space.tenant_mark is not None
        self.registry = Registry(section(config, "registry", Limits), has_tenants=has_tenants)
        self._epoch_offset_s = time.time() - time.monotonic()
        self._counted_blocks: tuple[dict[str, int] | None, float] = None, 0.0
        self._tenant_secret = TenantSecret() if has_tenants else None
        logger.info("TokenCake: %s watches this engine's calls", type(self).__name__)
        if (problem := front_end_problem(os.environ)) is not None:
            logger.warning("TokenCake: %s", problem)

    def add_request(self, request: Request) -> None:
        """Stock, then note who calls."""
        is_new = request.request_id not in self.requests
        if self._tenant_secret is not None and not self.space.tenants_share_prefixes:
            # Who sent it is not known, so it may learn nothing of what others have sent.
            request.skip_reading_prefix_cache |= (
                self._tenant_secret.tenants().prefix_from_salt(request.cache_salt) is None
            )
        super().add_request(request)
        if is_new:
            with self._advice():
                self._note_hint(request)

    def tenant_of(self, request: Request) -> str:
        """The prefix of the tenant that sent it, from its hint or its salt; empty where nothing proves one."""
        hint = self.registry.hint_of(request.request_id)
        if hint is not None or self._tenant_secret is None:
            return "" if hint is None else hint.tenant
        return self._tenant_secret.tenants().prefix_from_salt(request.cache_salt) or ""

    def _note_hint(self, request: Request) -> None:
        params = request.sampling_params
        text = (params.extra_args or {}).get(protocol.HINT_KEY) if params is not None else None
        if text is None:
            self.registry.counts["hints", "absent"] += 1
            return
        tenants = None if self._tenant_secret is None else self._tenant_secret.tenants()
        try:
            hint = protocol.parse_hint(text, tenants)
        except protocol.UnmarkedError as error:
            self.registry.counts["hints", "unmarked"] += 1
            logger.debug("TokenCake: the hint of request %s does not count: %s", request.request_id, error)
            return
        except protocol.ProtocolError as error:
            self.registry.counts["hints", "void"] += 1
            logger.debug("TokenCake: request %s has a void hint: %s", request.request_id, error)
            return
        is_kept = self.registry.add_call(request.request_id, hint, request.num_prompt_tokens, time.monotonic())
        self.registry.counts["hints", "accepted" if is_kept else "refused"] += 1

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Stock, then note which calls got their first slot."""
        output = super().schedule(*args, **kwargs)
        if output.scheduled_new_reqs:
            with self._advice():
                now = time.monotonic()
                for new in output.scheduled_new_reqs:
                    # Set by vLLM at the first scheduling, taken away with the first output: readable just here.
                    stats = self.requests[new.req_id].prefill_stats
                    self.registry.schedule_call(
                        new.req_id,
                        stats.num_local_cached_tokens if stats else 0,
                        stats.num_external_cached_tokens if stats else 0,
                        now,
                    )
        return output

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        with self._advice():
            self.registry.preempt_call(request.request_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        with self._advice():
            self.registry.finish_call(
                request.request_id,
                request.num_output_tokens,
                is_aborted=self._is_aborted(request),
                now=time.monotonic(),
            )
        return super()._free_request(request, *args, **kwargs)

    @staticmethod
    def _is_aborted(request: Request) -> bool:
        return request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)

    def _yield_pins(self) -> bool:
        """Give up what is held for stalled agents, as far as the first in line needs it; whether anything was."""
        return False

    def can_restore(self) -> bool:
        """Whether what a preempted call had computed comes back from the host."""
        return False

    def storing(self) -> Mapping[int, int]:
        """How often each device block is held by copies to the host, by its id."""
        return {}

    # --- what the API server asks for, on the engine's own loop, between two steps ------------------

    def tokencake_events(self, events: list[dict[str, Any]], received: float, tenant: str = "") -> dict[str, Any]:
        """Apply parsed events of `tenant` that reached the API server at `received` (seconds since the epoch)."""
        now = time.monotonic()
        waited_s = min(max(0.0, time.time() - received), protocol.MAX_AGO_S)
        scoped = [protocol.scoped(protocol.parse_event(event), tenant) for event in events]
        outcomes = [self.registry.apply(event, now - waited_s) for event in scoped]
        return {"outcomes": outcomes, "need": self.registry.unknown_graphs(tenant)}

    def epoch_offset_s(self) -> float:
        """From the engine's clock to seconds since the epoch: the same each time, until the system's clock is set."""
        offset_s = time.time() - time.monotonic()
        if abs(offset_s - self._epoch_offset_s) > _CLOCK_SET_S:
            self._epoch_offset_s = offset_s
        return self._epoch_offset_s

    def tokencake_state(
        self,
        session: str | None,
        app: str | None,
        limit: int,
        tenant: str | None = None,
        before: float | None = None,
    ) -> dict[str, Any]:
        """`state_view` in seconds since the epoch."""
        state = state_view(
            self.registry,
            self.epoch_offset_s(),
            session=session,
            app=app,
            tenant=tenant,
            limit=limit,
            before=before,
        )
        return {**state, "kv_blocks": self._kv_blocks() if tenant is None else self.own_blocks(tenant)}

    def tokencake_metrics(self) -> dict[str, Any]:
        """`Registry.drain`, and the gauges with a label as `{metric: {label: value}}`."""
        return {**self.registry.drain(), "labelled": {"kv_blocks": self._kv_blocks()}}

    def _kv_blocks(self) -> dict[str, int]:
        """`block_budget`; of a large device as of at most a second ago, since it looks at every block."""
        counted, at_s = self._counted_blocks
        now = time.monotonic()
        if counted is None or sum(counted.values()) <= _FEW_BLOCKS or not 0 <= now - at_s < _COUNTED_S:
            self._counted_blocks = counted, _ = self.block_budget(), now
        return counted

    def block_budget(self) -> dict[str, int]:
        """Who has the device's blocks."""
        return block_budget(self, {})

    def own_blocks(self, tenant: str) -> dict[str, int]:
        """What one tenant has of them."""
        return own_blocks(self, (), tenant)

    @contextlib.contextmanager
    def _advice(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.registry.counts["errors",] += 1
            logger.exception("TokenCake: a defect of the plug-in; the request goes on as in stock vLLM")


class TokenCakeScheduler(StepMixin, TimeMixin, SpaceMixin, TokenCakeMixin, Scheduler):
    """For engines without async scheduling."""


class TokenCakeAsyncScheduler(StepMixin, TimeMixin, SpaceMixin, TokenCakeMixin, AsyncScheduler):
    """For engines with async scheduling."""


def create_scheduler(*args: Any, **kwargs: Any) -> TokenCakeMixin:
    """The scheduler that fits `vllm_config`; for `--scheduler-cls`, which vLLM only ever calls."""
    is_async = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (TokenCakeAsyncScheduler if is_async else TokenCakeScheduler)(*args, **kwargs)
