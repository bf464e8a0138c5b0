"""Index of the prefixes that waiting, running and expected requests use.

A cached prefix is the KV of one request, as the hashes of its full blocks. It is *waiting* or *running* with its
request, then *stalled*: until the requests that extend it have come, or its session or application has ended, or none
came for so long that it is given up. A block that no prefix in the index refers to is unreferenced.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from tokencake.protocol import Hint

if TYPE_CHECKING:
    from tokencake.forecast.reuse import Claim

Phase: TypeAlias = Literal["waiting", "running", "stalled"]

MAX_PREFIXES: Final = 4_096
MIN_OVERLAP: Final = 0.5
"""A call that shares at least so much of a stalled chain of its session is taken for the one that extends it."""


@dataclass(slots=True, eq=False)
class CachedPrefix:
    """One prefix somebody will want, from its head on."""

    id: str
    """The request's id."""
    block_hashes: Sequence[bytes]
    hint: Hint | None
    phase: Phase
    since_s: float
    tenant: str = ""
    """Prefix of its tenant; empty where none is known."""
    expected_children: int | None = None
    """Calls that will extend it and have not come; None until the first of them says how many there are."""
    give_up_s: float | None = None
    keep_until_s: float | None = None
    """When a pinned chain is copied after all; None where it is not pinned for a short stall."""
    due_s: float | None = None
    """When its upload should start; None where none is planned."""
    back_s: float = 0.0
    """When the agent is expected back, in the middle of the forecast."""
    claim: Claim | None = None
    """Why no call should extend it, believed or not."""
    outcome: str = "none"
    """What was decided for the stall, for the answer and the state."""
    is_uploaded: bool = False
    """Its upload is complete or was given up: there is only one for each stall."""

    def remaining_s(self, now_s: float) -> float:
        """Until the agent is back, in the middle of the forecast. Once overdue, it lasts about as long again."""
        return abs(self.back_s - now_s)


@dataclass(slots=True)
class PrefixIndex:
    """All chains of one engine, in bounded memory."""

    by_id: OrderedDict[str, CachedPrefix] = field(default_factory=OrderedDict)
    refcounts: dict[bytes, int] = field(default_factory=dict)
    """By how many chains each block is wanted."""
    _stalled_at: dict[bytes, list[CachedPrefix]] = field(default_factory=dict)
    """Stalled chains by their last block."""
    _by_session: dict[str, set[str]] = field(default_factory=dict)
    _subagents: dict[str, set[str]] = field(default_factory=dict)
    """Chains of sub-agents by the call inside which they work."""

    def __iter__(self) -> Iterator[CachedPrefix]:
        return iter(self.by_id.values())

    def arrive(
        self, request_id: str, block_hashes: Sequence[bytes], hint: Hint | None, now_s: float, tenant: str = ""
    ) -> CachedPrefix | None:
        """A call came with a prompt of the full blocks `block_hashes`; returns the stalled chain that it extends.

        Of its own tenant: where cached prefixes are shared, another's may have the same blocks.
        """
        tenant = hint.tenant if hint is not None else tenant
        predecessor = self._predecessor(block_hashes, tenant) or self._same_session_match(block_hashes, hint)
        self.remove(request_id)
        self._add(CachedPrefix(request_id, block_hashes, hint, "waiting", now_s, tenant))
        if predecessor is not None:
            if predecessor.expected_children is None:
                predecessor.expected_children = (hint.fan_out if hint else None) or 1
            predecessor.expected_children -= 1
            if predecessor.expected_children <= 0:
                self.remove(predecessor.id)
        return predecessor

    def on_preempt(self, prefix: CachedPrefix, block_hashes: Sequence[bytes]) -> None:
        """A running request has lost its blocks and waits; it will need all that it had computed.

        `block_hashes` include generated tokens, which the prompt's hashes miss: their blocks would look unreferenced.
        """
        for key in block_hashes[len(prefix.block_hashes) :]:
            self.refcounts[key] = self.refcounts.get(key, 0) + 1
        if len(block_hashes) > len(prefix.block_hashes):
            prefix.block_hashes = block_hashes
        prefix.phase = "waiting"

    def stall(self, request_id: str, block_hashes: Sequence[bytes], now_s: float) -> CachedPrefix | None:
        """The call is over and left the blocks `block_hashes`; its chain waits for those who extend it."""
        prefix = self.remove(request_id)
        if prefix is None or not block_hashes:
            return None
        stalled = CachedPrefix(request_id, block_hashes, prefix.hint, "stalled", now_s, prefix.tenant)
        self._add(stalled)
        return stalled

    def remove(self, request_id: str) -> CachedPrefix | None:
        """Nobody wants this chain any more."""
        prefix = self.by_id.pop(request_id, None)
        if prefix is None:
            return None
        for key in prefix.block_hashes:
            left = self.refcounts[key] - 1
            if left:
                self.refcounts[key] = left
            else:
                del self.refcounts[key]
        if prefix.phase == "stalled":
            ends = self._stalled_at[prefix.block_hashes[-1]]
            ends.remove(prefix)
            if not ends:
                del self._stalled_at[prefix.block_hashes[-1]]
        if prefix.hint is not None:
            names = self._by_session[prefix.hint.session]
            names.discard(request_id)
            if not names:
                del self._by_session[prefix.hint.session]
            if prefix.hint.parent_call is not None:
                subagents = self._subagents[prefix.hint.parent_call]
                subagents.discard(request_id)
                if not subagents:
                    del self._subagents[prefix.hint.parent_call]
        return prefix

    def of_session(self, session: str) -> list[CachedPrefix]:
        """Its chains."""
        return [self.by_id[name] for name in self._by_session.get(session, ())]

    def subagents_of(self, prefix: CachedPrefix) -> list[CachedPrefix]:
        """Those of the sub-agents that work inside a tool call of this chain's call."""
        call = (prefix.hint.call if prefix.hint else None) or prefix.id
        return [self.by_id[name] for name in self._subagents.get(call, ())]

    def join_peers(self, prefix: CachedPrefix) -> list[CachedPrefix]:
        """The other branches of its application that feed the same join."""
        hint = prefix.hint
        if hint is None or hint.join is None or hint.app is None:
            return []
        return [
            other
            for other in self
            if other.hint is not None
            and (other.hint.app, other.hint.join) == (hint.app, hint.join)
            and other.hint.session != hint.session
        ]

    def unreferenced(self, prefix: CachedPrefix) -> list[bytes]:
        """The blocks of a removed chain that nobody else wants, from the tail."""
        return [key for key in reversed(prefix.block_hashes) if key not in self.refcounts]

    def overflow(self) -> Iterable[CachedPrefix]:
        """Stalled chains beyond the bound, the oldest of the tenant with most; the caller removes them."""
        surplus = len(self.by_id) - MAX_PREFIXES
        if surplus <= 0:
            return []
        stalled: dict[str, deque[CachedPrefix]] = {}
        for prefix in self:
            if prefix.phase == "stalled":
                stalled.setdefault(prefix.tenant, deque()).append(prefix)
        most = (max(stalled.values(), key=len, default=()) for _ in range(surplus))
        return [prefixes.popleft() for prefixes in most if prefixes]

    def _add(self, prefix: CachedPrefix) -> None:
        self.by_id[prefix.id] = prefix
        for key in prefix.block_hashes:
            self.refcounts[key] = self.refcounts.get(key, 0) + 1
        if prefix.phase == "stalled":
            self._stalled_at.setdefault(prefix.block_hashes[-1], []).append(prefix)
        if prefix.hint is not None:
            self._by_session.setdefault(prefix.hint.session, set()).add(prefix.id)
            if prefix.hint.parent_call is not None:
                self._subagents.setdefault(prefix.hint.parent_call, set()).add(prefix.id)

    def _predecessor(self, block_hashes: Sequence[bytes], tenant: str) -> CachedPrefix | None:
        if not self._stalled_at:
            return None
        for key in reversed(block_hashes):
            for prefix in self._stalled_at.get(key, ()):
                if prefix.tenant == tenant:
                    return prefix
        return None

    def _same_session_match(self, block_hashes: Sequence[bytes], hint: Hint | None) -> CachedPrefix | None:
        """The stalled chain of the same session that `block_hashes` shares most of.

        An answer often comes back in other tokens than it was given in: then the prompt is extended, the answer is not.
        """
        best, best_share = None, MIN_OVERLAP
        for prefix in self.of_session(hint.session) if hint is not None else ():
            if prefix.phase == "stalled":
                share = _common(prefix.block_hashes, block_hashes) / len(prefix.block_hashes)
                if share >= best_share:
                    best, best_share = prefix, share
        return best


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Blocks that two chains share: a hash stands for all that is before it."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda place: one[place] != other[place])
