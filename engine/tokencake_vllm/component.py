"""Components of the scheduler: what each may do at each moment of a request and of a step.

The shell (`scheduler.TokenCakeMixin`) calls them around vLLM's own methods. They are layers: on the way into vLLM
(`before_*`) the outermost comes first, on the way out (`on_added`, `after_*`, `on_events`) the innermost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from tokencake.protocol import Event, Hint

logger = init_logger("vllm.tokencake")


@dataclass(frozen=True, slots=True)
class TaggedRequest:
    """A request that lives in vLLM's scheduler, with what is known of its sender. All components share it."""

    request: Request
    hint: Hint | None
    """None where the client sent none, or one that does not count."""
    tenant: str
    """Prefix of the tenant's ids; empty where tenants are not kept apart, or nothing proves one."""


class SchedulerComponent:
    """The hooks of one component; each does nothing here. `now` is the engine's clock in seconds."""

    def on_added(self, tagged: TaggedRequest, now: float) -> None:
        """VLLM has put a new request into its queue."""

    def before_preempt(self, request: Request, now: float) -> None:
        """VLLM is about to take the blocks of a running request."""

    def after_preempt(self, request: Request) -> None:
        """The request waits again, without blocks."""

    def before_free(self, request: Request, now: float) -> None:
        """The request has ended and still has its blocks."""

    def before_step(self, now: float) -> None:
        """VLLM is about to schedule a step."""

    def after_step(self, output: SchedulerOutput, now: float) -> None:
        """VLLM has scheduled a step."""

    def after_update(self, scheduled_tokens: int, step_s: float, now: float) -> None:
        """VLLM has taken in the results of a step of `scheduled_tokens` tokens that took `step_s` seconds."""

    def on_events(self, events: Sequence[Event], now: float) -> None:
        """The registry has applied these events."""


class Offload(Protocol):
    """What admission asks of the component that moves blocks to the host."""

    @property
    def can_restore(self) -> bool:
        """Whether what a preempted request had computed comes back from the host."""

    def yield_pins(self) -> bool:
        """Unpin blocks of stalled agents, as far as the first request in the queue needs them; whether any were."""

    def storing(self) -> Mapping[int, int]:
        """How often copies to the host hold each device block, by its id."""


class ErrorContainment:
    """A context manager in which errors end: they are logged and counted, and vLLM goes on as without the plug-in.

    Args:
        count: counts one error.
    """

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count

    def __enter__(self) -> None:
        """It has no state and may be entered again inside."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Swallow every `Exception`."""
        if not isinstance(error, Exception):
            return False
        self._count()
        logger.error(
            "TokenCake: a defect of the plug-in; the request goes on as in stock vLLM",
            exc_info=(type(error), error, traceback),
        )
        return True
