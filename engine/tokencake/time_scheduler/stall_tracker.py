"""Which agents are stalled, how long will each stall still last, and what does its end teach?

Joins the chains of one engine with the registry of calls and events. Knows nothing of blocks or copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, assert_never

from tokencake import protocol
from tokencake.bounded import BoundedDict
from tokencake.forecast.durations import Forecast, Stall
from tokencake.forecast.reuse import Returns
from tokencake.forecast.roles import role_of
from tokencake.registry.records import lifetime_of
from tokencake.time_scheduler.dropped import Dropped, SharedBlocks
from tokencake.time_scheduler.expected_stall import AFTER_TOOLS, ANSWER, ended_s, expected_rest, give_up_after
from tokencake.time_scheduler.prefixes import MAX_CHAINS, Chain, Chains

if TYPE_CHECKING:
    from tokencake.forecast.reuse import Claim
    from tokencake.protocol import Event, Hint
    from tokencake.registry.apply_events import ToolEvent
    from tokencake.registry.records import Call, Session
    from tokencake.registry.registry import Registry


_BLOCKS: Final = 65_536
"""Of an engine whose size is not told."""
_DROPPED_TIMES: Final = 2
_SHARED_TIMES: Final = 4
"""So many times the blocks of the device are remembered, dropped ones and users."""


class StallBook:
    """The stalls of one engine with so many device `blocks`."""

    def __init__(self, registry: Registry, blocks: int = _BLOCKS) -> None:
        self.chains = Chains()
        self.forecast = Forecast()
        self.returns = Returns()
        self.dropped = Dropped(_DROPPED_TIMES * blocks, self.returns.refute)
        self._shared = SharedBlocks(_SHARED_TIMES * blocks)
        self._given_up: BoundedDict[str, Chain] = BoundedDict(MAX_CHAINS)
        """The last chain of a session that was given up, with one block from its middle."""
        self._registry = registry

    # --- the life of a call -----------------------------------------------------------------------------

    def arrive(
        self, request_id: str, keys: Sequence[bytes], hint: Hint | None, now: float, tenant: str = ""
    ) -> Chain | None:
        """A call came; returns the stalled chain that it extends, and learns from its return."""
        parent = self.chains.arrive(request_id, keys, hint, now, tenant)
        late = None if hint is None else self._given_up.pop(hint.session, None)
        came = parent or (late if late is not None and late.keys[0] in keys else None)
        if came is not None:
            self._learn_outcome(came, came=True)
            self._learn_return(came, now)
        return parent

    def wake(self, keys: Sequence[bytes], request_id: str, hint: Hint | None) -> list[bytes]:
        """A call asks for `keys`: no longer dropped are these; returns those that had been put first."""
        return self.dropped.wake(keys, request_id if hint is None else lifetime_of(hint))

    def _learn_outcome(self, chain: Chain, *, came: bool) -> None:
        if chain.claim != "final":
            self.returns.learn(chain.hint, came=came)
        if chain.claim is not None:
            self.returns.learn(chain.hint, came=came, claim=chain.claim)

    def _learn_return(self, parent: Chain, now: float) -> None:
        hint, call = parent.hint, self.call_of(parent)
        agent = role_of(hint).of_agent
        tools = list(call.tools.values()) if call else []
        if not tools and not (hint and hint.expects_tools):
            self.forecast.learn(agent, None, now - parent.since_s)
        for tool in tools:
            if tool.is_open and tool.started_s is not None:  # its end was lost: the next call is one
                self.forecast.learn(agent, tool.tool, now - tool.started_s)
        if hint is not None and tools:
            over_s = ended_s(parent, tools, self.session_of(parent))
            is_open = any(tool.is_open for tool in tools)
            self.forecast.learn(role_of(hint), AFTER_TOOLS, 0.0 if is_open or over_s is None else now - over_s)

    def start(self, request_id: str, now: float) -> None:
        """A call has a slot, for the first time or again."""
        if (chain := self.chains.by_id.get(request_id)) is not None:
            chain.phase, chain.since_s = "running", now

    def finish(self, request_id: str, keys: Sequence[bytes], now: float) -> tuple[Chain, Stall] | None:
        """A call has ended well and left the blocks `keys`: its stall begins, and with it what is expected of it."""
        running = self.chains.by_id.get(request_id)
        if running is not None and running.phase == "running" and running.hint is not None:
            self.forecast.learn(role_of(running.hint).of_agent, ANSWER, now - running.since_s)
        chain = self.chains.stall(request_id, keys, now)
        if chain is None:
            return None
        self._shared.use(keys, self._lifetime(chain))
        chain.claim = self._claim(chain.hint)
        rest = self.rest(chain, now)
        chain.back_s, chain.give_up_s = now + rest.quantile(0.5), now + give_up_after(rest, ())
        return chain, rest

    def drop(self, chain: Chain) -> None:
        """A claim says that nothing will extend it, and is believed: what only it had may go first."""
        self.chains.remove(chain.id)
        if chain.claim is None:
            return
        if chain.heirs_left is None:
            self._learn_outcome(chain, came=False)
        lifetime = self._lifetime(chain)
        private = [key for key in self.chains.dead(chain) if self._shared.is_private(key, lifetime)]
        self.dropped.add(role_of(chain.hint), chain.claim, lifetime, private)

    def give_up(self, chain: Chain) -> None:
        """No call came for so long that none is expected; one that comes after all is learned from."""
        self.chains.remove(chain.id)
        if chain.heirs_left is None and chain.hint is not None:
            self._learn_outcome(chain, came=False)
            chain.keys = chain.keys[len(chain.keys) // 2 :][:1]
            self._given_up[chain.hint.session] = chain

    # --- what is expected -------------------------------------------------------------------------------

    def rest(self, chain: Chain, now: float) -> Stall:
        """How long its stall will still last."""
        return expected_rest(chain, self.call_of(chain), self.session_of(chain), self.chains, self.forecast, now)

    def may_last(self, chain: Chain) -> bool:
        """Whether it waits for a sub-agent that will call again: then nobody can say how long."""
        return any(hired.hint is None or hired.hint.reuse != "final" for hired in self.chains.hired_by(chain))

    def refine(self, chain: Chain, now: float) -> Stall:
        """The same, after something has told more about it."""
        rest, call = self.rest(chain, now), self.call_of(chain)
        chain.back_s = now + rest.quantile(0.5)
        chain.give_up_s = now + give_up_after(rest, [tool.deadline_s for tool in call.tools.values()] if call else ())
        return rest

    def believed_claim(self, chain: Chain) -> Claim | None:
        """Why nothing will extend it, where such claims have been true."""
        claim = chain.claim
        return claim if claim is not None and self.returns.is_believed(chain.hint, claim) else None

    def _claim(self, hint: Hint | None) -> Claim | None:
        if hint is None:
            return None
        session = self._registry.sessions.get(hint.session)
        is_over = session is not None and session.ended is not None
        return "final" if hint.reuse == "final" else "over" if is_over else None

    @staticmethod
    def _lifetime(chain: Chain) -> str:
        return chain.id if chain.hint is None else lifetime_of(chain.hint)

    # --- events -----------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> tuple[list[Chain], list[Chain]]:
        """The registry has applied `event`: the prefixes whose stall it changes, and those to drop."""
        match event:
            case protocol.ToolStart() | protocol.ToolProgress() | protocol.ToolEnd():
                return self._on_tool(event), []
            case protocol.StallStart() | protocol.StallEnd():
                return self._stalled(event.session), []
            case protocol.SessionEnd() | protocol.AppEnd():
                ended = [chain for session in self._registry.ended_by(event) for chain in self._stalled(session.id)]
                for chain in ended:
                    chain.claim = chain.claim or "over"
                return [], [chain for chain in ended if self.believed_claim(chain) is not None]
            case protocol.Graph():  # says nothing of a stall
                return [], []
            case _:
                assert_never(event)

    def _on_tool(self, event: ToolEvent) -> list[Chain]:
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

    def stalled_at(self, call_id: str) -> list[Chain]:
        """The chains that this call left."""
        call = self._registry.calls.get(call_id)
        return [] if call is None else [c for c in self._stalled(call.hint.session) if self.call_of(c) is call]

    def _stalled(self, session: str) -> list[Chain]:
        return [chain for chain in self.chains.of_session(session) if chain.phase == "stalled"]

    def call_of(self, chain: Chain) -> Call | None:
        """What the registry knows of its call."""
        return None if chain.hint is None else self._registry.calls.get(chain.hint.call or chain.id)

    def session_of(self, chain: Chain) -> Session | None:
        """What the registry knows of its session."""
        return None if chain.hint is None else self._registry.sessions.get(chain.hint.session)
