"""JSON view of the registry for `GET /v1/tokencake/state`; times in seconds since the epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from tokencake import protocol
from tokencake.registry.timeline import page_of

if TYPE_CHECKING:
    from tokencake.registry.records import CallRecord, Session
    from tokencake.registry.registry import Registry

Clock: TypeAlias = Callable[[float | None], float | None]
"""Turns a time of the engine's clock into seconds since the epoch."""


def state_view(
    registry: Registry,
    epoch_offset_s: float,
    *,
    session: str | None = None,
    app: str | None = None,
    tenant: str | None = None,
    limit: int = 200,
    before: float | None = None,
) -> dict[str, Any]:
    """One page of calls, the newest ones, with their sessions and apps. See `page_of` for what it costs at most.

    Args:
        registry: the records.
        epoch_offset_s: added to every time, to turn the monotonic clock into seconds since the epoch.
        session: only this session.
        app: only calls of this application.
        tenant: only this tenant's calls and their number; None: everything, for the operator.
        limit: maximum number of calls.
        before: the `next` of the page before this one.

    Returns:
        The page as JSON. `next` is None on the last page. `order` has a time for each call, by which pages of several
        engines are put together.
    """
    page = page_of(
        registry.newest_calls(tenant, session, None if before is None else before - epoch_offset_s),
        limit,
        is_wanted=lambda call: app in (None, call.hint.app),
        weight=lambda call: 1 + len(call.tools),
    )
    chosen = [call for _, call in reversed(page.entries)]
    names = dict.fromkeys(call.hint.session for call in chosen)
    apps = dict.fromkeys(call.hint.app for call in chosen if call.hint.app)

    def when(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds + epoch_offset_s, 6)

    return {
        "v": protocol.VERSION,
        "totals": registry.totals if tenant is None else registry.totals_of(tenant),
        "apps": {
            name: {"first_seen": when(registry.apps[name].first_seen_s), "ended": registry.apps[name].ended}
            for name in apps
            if name in registry.apps
        },
        "sessions": {
            name: session_view(known, when, is_stalled=registry.is_stalled(known))
            for name in names
            if (known := registry.sessions.get(name)) is not None
        },
        "calls": [call_view(call, when) for call in chosen],
        "order": [when(call.order_s) for call in chosen],
        "next": when(page.next_s),
    }


def session_view(session: Session, when: Clock, *, is_stalled: bool) -> dict[str, Any]:
    """A session as JSON."""
    return {
        "agent": session.agent,
        "app": session.app,
        "status": "running"
        if session.live_requests
        else "stalled"
        if is_stalled
        else "ended"
        if session.ended
        else "idle",
        "touched": when(session.touched_s),
        "waits": {
            kind: {"start": when(wait.started_s), "end": when(wait.ended_s), "estimate_s": wait.estimate_s}
            for kind, wait in session.waits.items()
        },
    }


def call_view(call: CallRecord, when: Clock) -> dict[str, Any]:
    """A call and its tool calls as JSON."""
    hint = call.hint
    return {
        "call": call.id,
        "session": hint.session,
        "app": hint.app,
        "agent": hint.agent,
        "graph": hint.graph,
        "node": hint.node,
        "parent_call": hint.parent_call,
        "parent_tool_call": hint.parent_tool_call,
        "status": call.status,
        "arrived": when(call.arrived_s),
        "scheduled": when(call.scheduled_s),
        "finished": when(call.finished_s),
        "queue_s": None if call.scheduled_s is None else call.scheduled_s - call.arrived_s,
        "prompt_tokens": call.prompt_tokens,
        "cached_tokens": {"device": call.cached_device_tokens, "host": call.cached_host_tokens},
        "output_tokens": call.output_tokens,
        "preemptions": call.preemptions,
        "tools": [
            {
                "tool_call": tool_call,
                "tool": tool.tool,
                "start": when(tool.started_s),
                "end": when(tool.ended_s),
                "duration_s": tool.duration_s,
                "status": tool.status,
                "estimate_s": tool.estimate_s,
                "stage": tool.stage,
                "fraction": tool.fraction,
            }
            for tool_call, tool in call.tools.items()
        ],
    }
