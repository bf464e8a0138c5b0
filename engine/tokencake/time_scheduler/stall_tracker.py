"""Tracker of stalled agents: when each stall begins and ends, its forecast, and what its end teaches.

Joins the prefix index of one engine with the registry of calls and events. Knows nothing of block pools or copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, assert_never

from tokencake import protocol
from tokencake.bounded import BoundedDict
from tokencake.forecast.durations import DurationDistribution, Forecast
from tokencake.forecast.reuse import ReuseProbability
from tokencake.forecast.roles import role_of
from tokencake.registry.records import lifetime_of
from tokencake.time_scheduler.dropped import Dropped, SharedBlocks
from tokencake.time_scheduler.expected_stall import AFTER_TOOLS, ANSWER, ended_s, expected_remaining, give_up_after
from tokencake.time_scheduler.prefixes import MAX_PREFIXES, CachedPrefix, PrefixIndex

if TYPE_CHECKING:
    from tokencake.forecast.reuse import Claim
    from tokencake.protocol import Event, Hint
    from tokencake.registry.apply_events import ToolEvent
    from tokencake.registry.records import CallRecord, Session
    from tokencake.registry.registry import Registry


_BLOCKS: Final = 65_536
"""Default number of device blocks."""
_DROPPED_TIMES: Final = 2
_SHARED_TIMES: Final = 4
"""Remembered dropped blocks and block users, as multiples of the device's blocks."""


class StallTracker:
    """The stalls of one engine with this number of device `blocks`."""

    def __init__(self, registry: Registry, blocks: int = _BLOCKS) -> None:
        self.prefixes = PrefixIndex()
        self.forecast = Forecast()
        self.reuse = ReuseProbability()
        self.dropped = Dropped(_DROPPED_TIMES * blocks, self.reuse.refute)
        self._shared = SharedBlocks(_SHARED_TIMES * blocks)
        self._given_up: BoundedDict[str, CachedPrefix] = BoundedDict(MAX_PREFIXES)
        """The last prefix of each session that was given up, reduced to one block from its middle."""
        self._registry = registry

    # --- the life of a call -----------------------------------------------------------------------------

    def arrive(
        self, request_id: str, block_hashes: Sequence[bytes], hint: Hint | None, now: float, tenant: str = ""
    ) -> CachedPrefix | None:
        """A call arrived; returns the stalled prefix that it extends, and learns from its return."""
        predecessor = self.prefixes.arrive(request_id, block_hashes, hint, now, tenant)
        late = None if hint is None else self._given_up.pop(hint.session, None)
        came = predecessor or (late if late is not None and late.block_hashes[0] in block_hashes else None)
        if came is not None:
            self._learn_outcome(came, came=True)
            self._learn_return(came, now)
        return predecessor

    def wake(self, block_hashes: Sequence[bytes], request_id: str, hint: Hint | None) -> list[bytes]:
        """A call asks for `block_hashes`: they are no longer dropped; returns those that had been put first."""
        return self.dropped.wake(block_hashes, request_id if hint is None else lifetime_of(hint))

    def _learn_outcome(self, prefix: CachedPrefix, *, came: bool) -> None:
        if prefix.claim != "final":
            self.reuse.learn(prefix.hint, came=came)
        if prefix.claim is not None:
            self.reuse.learn(prefix.hint, came=came, claim=prefix.claim)

    def _learn_return(self, predecessor: CachedPrefix, now: float) -> None:
        hint, call = predecessor.hint, self.call_of(predecessor)
        agent = role_of(hint).of_agent
        tools = list(call.tools.values()) if call else []
        if not tools and not (hint and hint.expects_tools):
            self.forecast.learn(agent, None, now - predecessor.since_s)
        for tool in tools:
            if tool.is_open and tool.started_s is not None:  # its end event was lost: the next call ends it
                self.forecast.learn(agent, tool.tool, now - tool.started_s)
        if hint is not None and tools:
            over_s = ended_s(predecessor, tools, self.session_of(predecessor))
            is_open = any(tool.is_open for tool in tools)
            self.forecast.learn(role_of(hint), AFTER_TOOLS, 0.0 if is_open or over_s is None else now - over_s)

    def start(self, request_id: str, now: float) -> None:
        """A call got a slot, for the first time or again."""
        if (prefix := self.prefixes.by_id.get(request_id)) is not None:
            prefix.phase, prefix.since_s = "running", now

    def finish(
        self, request_id: str, block_hashes: Sequence[bytes], now: float
    ) -> tuple[CachedPrefix, DurationDistribution] | None:
        """A request has finished and left the blocks `block_hashes`: its stall begins, with a forecast."""
        running = self.prefixes.by_id.get(request_id)
        if running is not None and running.phase == "running" and running.hint is not None:
            self.forecast.learn(role_of(running.hint).of_agent, ANSWER, now - running.since_s)
        prefix = self.prefixes.stall(request_id, block_hashes, now)
        if prefix is None:
            return None
        self._shared.use(block_hashes, self._lifetime(prefix))
        prefix.claim = self._claim(prefix.hint)
        remaining = self.remaining(prefix, now)
        prefix.back_s, prefix.give_up_s = now + remaining.quantile(0.5), now + give_up_after(remaining, ())
        return prefix, remaining

    def drop(self, prefix: CachedPrefix) -> None:
        """A believed claim says that nothing will extend it: its exclusive blocks are reused first."""
        self.prefixes.remove(prefix.id)
        if prefix.claim is None:
            return
        if prefix.expected_children is None:
            self._learn_outcome(prefix, came=False)
        lifetime = self._lifetime(prefix)
        private = [key for key in self.prefixes.unreferenced(prefix) if self._shared.is_exclusive(key, lifetime)]
        self.dropped.add(role_of(prefix.hint), prefix.claim, lifetime, private)

    def give_up(self, prefix: CachedPrefix) -> None:
        """The stall has lasted too long for a call to be expected; one that arrives after all is learned from."""
        self.prefixes.remove(prefix.id)
        if prefix.expected_children is None and prefix.hint is not None:
            self._learn_outcome(prefix, came=False)
            prefix.block_hashes = prefix.block_hashes[len(prefix.block_hashes) // 2 :][:1]
            self._given_up[prefix.hint.session] = prefix

    # --- what is expected -------------------------------------------------------------------------------

    def remaining(self, prefix: CachedPrefix, now: float) -> DurationDistribution:
        """The distribution of its remaining stall."""
        return expected_remaining(
            prefix, self.call_of(prefix), self.session_of(prefix), self.prefixes, self.forecast, now
        )

    def has_open_subagents(self, prefix: CachedPrefix) -> bool:
        """Whether it waits for a sub-agent that will call again: its stall has no reliable forecast then."""
        return any(
            subagents.hint is None or subagents.hint.reuse != "final"
            for subagents in self.prefixes.subagents_of(prefix)
        )

    def reforecast(self, prefix: CachedPrefix, now: float) -> DurationDistribution:
        """The same after an event; the expected return and the deadline of the prefix are updated."""
        remaining, call = self.remaining(prefix, now), self.call_of(prefix)
        prefix.back_s = now + remaining.quantile(0.5)
        prefix.give_up_s = now + give_up_after(
            remaining, [tool.deadline_s for tool in call.tools.values()] if call else ()
        )
        return remaining

    def believed_claim(self, prefix: CachedPrefix) -> Claim | None:
        """Its claim that nothing will extend it, where such claims have been true."""
        claim = prefix.claim
        return claim if claim is not None and self.reuse.is_believed(prefix.hint, claim) else None

    def _claim(self, hint: Hint | None) -> Claim | None:
        if hint is None:
            return None
        session = self._registry.sessions.get(hint.session)
        is_over = session is not None and session.ended is not None
        return "final" if hint.reuse == "final" else "over" if is_over else None

    @staticmethod
    def _lifetime(prefix: CachedPrefix) -> str:
        return prefix.id if prefix.hint is None else lifetime_of(prefix.hint)

    # --- events -----------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> tuple[list[CachedPrefix], list[CachedPrefix]]:
        """The registry has applied `event`: the prefixes whose stall it changes, and those to drop."""
        match event:
            case protocol.ToolStart() | protocol.ToolProgress() | protocol.ToolEnd():
                return self._on_tool(event), []
            case protocol.StallStart() | protocol.StallEnd():
                return self._stalled(event.session), []
            case protocol.SessionEnd() | protocol.AppEnd():
                ended = [prefix for session in self._registry.ended_by(event) for prefix in self._stalled(session.id)]
                for prefix in ended:
                    prefix.claim = prefix.claim or "over"
                return [], [prefix for prefix in ended if self.believed_claim(prefix) is not None]
            case protocol.Graph():  # says nothing of a stall
                return [], []
            case _:
                assert_never(event)

    def _on_tool(self, event: ToolEvent) -> list[CachedPrefix]:
        call = self._registry.calls.get(event.call)
        if call is None:
            return []
        tool = call.tools.get(event.tool_call)
        if isinstance(event, protocol.ToolEnd) and tool is not None and tool.duration_s is not None:
            agent = role_of(call.hint).of_agent
            expected = self.forecast.stall(agent, tool.tool, tool.estimate_s)
            self._registry.observe("forecast_error_s", abs(expected.quantile(0.5) - tool.duration_s))
            self.forecast.learn(agent, tool.tool, tool.duration_s)
        return self.stalled_at(call.id)

    def stalled_at(self, call_id: str) -> list[CachedPrefix]:
        """The stalled prefixes that this call left."""
        call = self._registry.calls.get(call_id)
        return [] if call is None else [c for c in self._stalled(call.hint.session) if self.call_of(c) is call]

    def _stalled(self, session: str) -> list[CachedPrefix]:
        return [prefix for prefix in self.prefixes.of_session(session) if prefix.phase == "stalled"]

    def call_of(self, prefix: CachedPrefix) -> CallRecord | None:
        """The registry's record of its call."""
        return None if prefix.hint is None else self._registry.calls.get(prefix.hint.call or prefix.id)

    def session_of(self, prefix: CachedPrefix) -> Session | None:
        """The registry's record of its session."""
        return None if prefix.hint is None else self._registry.sessions.get(prefix.hint.session)
