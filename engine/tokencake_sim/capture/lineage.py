"""Dependencies between the calls of a past run, inferred from times and prompt lengths where the state has none.

A call builds on the one before it in its session, if its prompt is no shorter. It came after the calls of other
sessions of its application that were just over when it arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokencake_sim.capture.past_calls import PastCall


@dataclass(frozen=True, slots=True)
class CallDependency:
    """Where one call of an application stands among the others."""

    parent: PastCall | None
    """It worked inside a tool call of this one."""
    previous: PastCall | None
    """The call before it in its session."""
    extends: bool
    """Whether its prompt begins with that of `previous`."""
    after: tuple[PastCall, ...]
    """Calls of other sessions that it waited for."""

    @property
    def base(self) -> PastCall | None:
        """The call whose context its prompt begins with."""
        return self.previous if self.extends else None


def applications(calls: Sequence[PastCall]) -> list[list[PastCall]]:
    """The calls of each application. Applications that share a session, the turns of one thread, are one."""
    group_of: dict[tuple[str, str], list[PastCall]] = {}
    groups: list[list[PastCall]] = []
    for call in calls:
        keys = (("app", call.app), ("session", call.session))
        found = [group_of[key] for key in keys if key in group_of]
        group = found[0] if found else []
        if not found:
            groups.append(group)
        for other in found[1:]:
            if other is not group:
                group += other
                groups = [kept for kept in groups if kept is not other]
                group_of |= {key: group for key, value in group_of.items() if value is other}
        group.append(call)
        group_of |= dict.fromkeys(keys, group)
    return sorted((sorted(group, key=_arrival) for group in groups), key=lambda group: _arrival(group[0]))


def dependencies_of(group: Sequence[PastCall]) -> dict[str, CallDependency]:
    """The dependency of every call of one application, whose calls are given in order of arrival."""
    parents = _parents(group)
    found = {}
    sessions: dict[str, list[PastCall]] = {}
    teams: dict[str | None, dict[str, PastCall]] = {}
    for call in group:
        parent = parents[call.id]
        own = sessions.setdefault(call.session, [])
        previous = next((other for other in reversed(own) if other.finished_s <= call.arrived_s), None)
        extends = previous is not None and call.prompt_tokens >= previous.prompt_tokens
        latest = teams.setdefault(None if parent is None else parent.id, {})
        siblings = [other for session, other in latest.items() if session != call.session]
        found[call.id] = CallDependency(parent, previous, extends, _waited_for(call, previous, siblings))
        own.append(call)
        latest[call.session] = call
    return found


def _parents(group: Sequence[PastCall]) -> dict[str, PastCall | None]:
    by_id = {call.id: call for call in group}
    found: dict[str, PastCall | None] = {}
    for call in group:
        parent = by_id.get(call.parent or "")
        is_inside = parent is not None and parent.finished_s <= call.arrived_s and call.over_s <= parent.over_s
        found[call.id] = parent if is_inside else None
    return found


def _waited_for(call: PastCall, previous: PastCall | None, siblings: Sequence[PastCall]) -> tuple[PastCall, ...]:
    """Of `siblings`, the newest call of each other session: those over last, if `call` can have waited for them."""
    over = [
        other
        for other in siblings
        if other.over_s <= call.arrived_s and (previous is None or other.arrived_s >= previous.over_s)
    ]
    newest_s = max((other.arrived_s for other in over), default=0.0)
    return tuple(one for one in over if one.over_s > newest_s)


def shared_prefixes(calls: Sequence[PastCall], dependencies: Mapping[str, CallDependency]) -> dict[str, int]:
    """Tokens that the sessions of each agent have in common: the least that a first call found in the cache.

    It is a lower bound for what they share, and no more than a guess where all first calls came at the same time.
    """
    found: dict[str, int] = {}
    for call in calls:
        if dependencies[call.id].previous is None and call.cached_tokens:
            found[call.agent] = min(found.get(call.agent, call.cached_tokens), call.cached_tokens)
    return found


def _arrival(call: PastCall) -> tuple[float, str]:
    return (call.arrived_s, call.id)
