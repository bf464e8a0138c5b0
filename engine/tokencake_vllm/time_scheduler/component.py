"""The Time Scheduler on vLLM: the arrival and the end of a request, preemption, steps, events, and waking the engine.

Without TokenCake's connector, or with `time.enabled=false`, `NoOffload` stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from tokencake_vllm.component import SchedulerComponent, TaggedRequest
from tokencake_vllm.connector import TokenCakeConnector
from tokencake_vllm.time_scheduler import kv_report
from tokencake_vllm.time_scheduler.forecast_file import ForecastFile
from tokencake_vllm.time_scheduler.stall_manager import StallManager
from tokencake_vllm.vllm_adapter.requests import compute_loads_again, started_requests

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from tokencake.protocol import Event
    from tokencake.registry.registry import Registry
    from tokencake_vllm.component import ErrorContainment
    from tokencake_vllm.transfer.host_cache import HostCache
    from tokencake_vllm.transfer.self_check import SelfCheck

logger = init_logger("vllm.tokencake")


class NoOffload(SchedulerComponent):
    """An engine whose KV stays on the device.

    Args:
        off_reason: why.
    """

    def __init__(self, off_reason: str | None) -> None:
        self._off_reason = off_reason

    @property
    def off_reason(self) -> str | None:
        """Why nothing is offloaded, or None."""
        return self._off_reason

    @property
    def host_blocks(self) -> int:
        """Blocks that the host has room for."""
        return 0

    @property
    def self_check(self) -> SelfCheck | None:
        """What the workers' self-check of the copies found; None until they have told."""
        return None

    @property
    def pinned(self) -> Mapping[str, Sequence[KVCacheBlock]]:
        """Device blocks pinned for stalled agents, by the id of the request that left them."""
        return {}

    @property
    def can_restore(self) -> bool:
        """Whether what a preempted request had computed comes back from the host."""
        return False

    def yield_pins(self) -> bool:
        """There are none."""
        return False

    def storing(self) -> Mapping[int, int]:
        """No copies."""
        return {}

    def pinned_for(self, tenant: str) -> Sequence[Sequence[KVCacheBlock]]:  # noqa: ARG002  # the interface's
        """The pinned blocks of each stalled agent of one tenant."""
        return []

    def describe_sessions(self, sessions: Mapping[str, dict[str, Any]]) -> None:
        """Add to each session's view where its KV is."""

    def wipe(self) -> int:
        """Overwrite free device blocks, for a test; returns how many."""
        return 0

    def is_due(self, now: float) -> bool:  # noqa: ARG002  # as above
        """Whether the engine should step although it may have no request."""
        return False

    def next_due_s(self) -> float | None:
        """When it should; None where it need not."""
        return None

    def bind_waker(self, wake: Callable[[], None]) -> None:
        """`wake` makes the engine loop look for work, from any thread."""

    def arm_waker(self, now: float) -> None:
        """The engine may sleep now: see that it wakes when something is due."""

    @contextmanager
    def resetting(self, contain_errors: ErrorContainment, *, drops_loads: bool) -> Iterator[None]:  # noqa: ARG002  # as above
        """While vLLM resets its prefix cache."""
        yield


class TimeComponent(NoOffload):
    """Moves the KV of stalled agents between the device and the host."""

    def __init__(
        self,
        scheduler: Scheduler,
        registry: Registry,
        connector: TokenCakeConnector,
        cache: HostCache,
        contain_errors: ErrorContainment,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(None)
        self.stalls = StallManager(scheduler, registry, cache, connector.settings)
        self._scheduler, self._cache, self._clock = scheduler, cache, clock
        self._contain_errors = contain_errors
        self._forecast_file = ForecastFile(self.stalls.tracker.forecast, connector.settings.forecast_file)
        connector.on_finished = self._finish
        logger.info(
            "TokenCake: Time Scheduler `%s`, %d blocks of host memory", connector.settings.policy, self.host_blocks
        )

    # --- a request ------------------------------------------------------------------------------------

    def on_added(self, tagged: TaggedRequest, now: float) -> None:
        """Find the stall that this call ends."""
        self.stalls.arrive(tagged, now)

    def before_preempt(self, request: Request, now: float) -> None:  # noqa: ARG002  # the hook's signature
        """Offload what it has computed."""
        self.stalls.preempt(request)

    def _finish(self, request: Request) -> dict[str, Any] | None:
        """Called by the connector while the request still holds its blocks; returns what the client is told."""
        with self._contain_errors:
            return self.stalls.finish(request, self._clock())
        return None

    # --- the step -------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """Do what is due."""
        self.stalls.before_step(now)

    def after_step(self, output: SchedulerOutput, now: float) -> None:
        """See which requests started."""
        new = [self._scheduler.requests[new.req_id] for new in output.scheduled_new_reqs]
        self.stalls.after_step(new, started_requests(output)[len(new) :], now)

    def after_update(self, scheduled_tokens: int, step_s: float, now: float) -> None:  # noqa: ARG002  # as above
        """Learn how fast the device computes."""
        self.stalls.learn_step(scheduled_tokens, step_s)

    # --- events ---------------------------------------------------------------------------------------

    def on_events(self, events: Sequence[Event], now: float) -> None:
        """Forecast the stalls that they change anew."""
        for event in events:
            with self._contain_errors:
                self.stalls.on_event(event, now)
        self._forecast_file.save(now)

    # --- waking the engine ----------------------------------------------------------------------------

    def is_due(self, now: float) -> bool:
        """Whether something of ours is due: the step that follows takes it off the list."""
        return self.stalls.wakeups.is_due(now)

    def next_due_s(self) -> float | None:
        """When the next stall wants to be looked at."""
        return self.stalls.wakeups.next_s(self.stalls.is_stalled)

    def bind_waker(self, wake: Callable[[], None]) -> None:
        """Remember it."""
        self.stalls.wakeups.wake = wake

    def arm_waker(self, now: float) -> None:
        """Set a timer to the next stall that wants to be looked at."""
        self.stalls.wakeups.arm(now, self.stalls.is_stalled)

    # --- what others ask ------------------------------------------------------------------------------

    @property
    def off_reason(self) -> str | None:
        """Why nothing is offloaded any more, or None."""
        return self._cache.off_reason

    @property
    def host_blocks(self) -> int:
        """Blocks that the host has room for."""
        return self._cache.tier.capacity

    @property
    def self_check(self) -> SelfCheck | None:
        """What the workers' self-check of the copies found; None until they have told."""
        return self._cache.self_check

    @property
    def pinned(self) -> Mapping[str, Sequence[KVCacheBlock]]:
        """Device blocks pinned for stalled agents, by the id of the request that left them."""
        return self._cache.pinned

    @property
    def can_restore(self) -> bool:
        """Whether what a preempted request had computed comes back from the host, as far as that has room."""
        return self.stalls.can_restore

    def yield_pins(self) -> bool:
        """Unpin blocks of stalled agents, as far as the first request in the queue needs them; whether any were."""
        before = len(self._cache.pinned)
        if before:
            self.stalls.make_room()
        return len(self._cache.pinned) < before

    def storing(self) -> Mapping[int, int]:
        """How often copies under way to the host hold each device block."""
        return self._cache.transfers.storing()

    def pinned_for(self, tenant: str) -> Sequence[Sequence[KVCacheBlock]]:
        """The pinned blocks of each stalled agent of one tenant."""
        return self.stalls.pins.of_tenant(tenant)

    def describe_sessions(self, sessions: Mapping[str, dict[str, Any]]) -> None:
        """Add to each session's view where its KV is."""
        for name, view in sessions.items():
            view["kv"] = kv_report.of_session(self.stalls.prefixes, self._cache, name)

    def wipe(self) -> int:
        """With `debug_checksums`: overwrite every free device block, to prove that what is hit later was copied."""
        return self._cache.wipe() if self.stalls.settings.debug_checksums else 0

    @contextmanager
    def resetting(self, contain_errors: ErrorContainment, *, drops_loads: bool) -> Iterator[None]:
        """Give back everything that is held; what the host has is as old as what the device had."""
        self.stalls.is_resetting = True
        try:
            with contain_errors:
                self.stalls.reset()
                if drops_loads:
                    compute_loads_again(self._scheduler)
            with self._cache.counted_as_free():
                yield
        finally:
            self.stalls.is_resetting = False


def make_offload(
    scheduler: Scheduler, registry: Registry, contain_errors: ErrorContainment, clock: Callable[[], float]
) -> NoOffload:
    """The component for the connector that the engine was started with."""
    connector = scheduler.connector
    if not isinstance(connector, TokenCakeConnector):
        return NoOffload("the engine was not started with TokenCakeConnector")
    if connector.cache is None:
        return NoOffload(connector.off_reason)
    return TimeComponent(scheduler, registry, connector, connector.cache, contain_errors, clock)
