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
"""A call that shares at least this part of a stalled prefix of its session counts as the one that extends it."""


@dataclass(slots=True, eq=False)
class CachedPrefix:
    """The KV of one request that waits, runs or is expected to be extended."""

    id: str
    """The request's id."""
    block_hashes: Sequence[bytes]
    hint: Hint | None
    phase: Phase
    since_s: float
    tenant: str = ""
    """Prefix of its tenant's ids; empty where none is known."""
    expected_children: int | None = None
    """Calls that will extend it and have not arrived; None until the first of them gives the fan-out."""
    give_up_s: float | None = None
    keep_until_s: float | None = None
    """When a pinned prefix is copied after all; None where it is not pinned for a short stall."""
    due_s: float | None = None
    """When its upload should start; None where none is planned."""
    back_s: float = 0.0
    """When the agent is expected back: the median of the forecast."""
    claim: Claim | None = None
    """Why no call should extend it, whether believed or not."""
    outcome: str = "none"
    """The decision for its stall, as reported in the answer and the state."""
    is_uploaded: bool = False
    """Its upload is complete or was given up: there is one upload per stall."""

    def remaining_s(self, now_s: float) -> float:
        """Seconds until the agent is back, by the median. An overdue stall is expected to last as long again."""
        return abs(self.back_s - now_s)


@dataclass(slots=True)
class PrefixIndex:
    """All prefixes of one engine, in bounded memory."""

    by_id: OrderedDict[str, CachedPrefix] = field(default_factory=OrderedDict)
    refcounts: dict[bytes, int] = field(default_factory=dict)
    """Number of prefixes that contain each block."""
    _stalled_at: dict[bytes, list[CachedPrefix]] = field(default_factory=dict)
    """Stalled prefixes by their last block."""
    _by_session: dict[str, set[str]] = field(default_factory=dict)
    _subagents: dict[str, set[str]] = field(default_factory=dict)
    """Prefixes of sub-agents by the call inside whose tool call they work."""

    def __iter__(self) -> Iterator[CachedPrefix]:
        return iter(self.by_id.values())

    def arrive(
        self, request_id: str, block_hashes: Sequence[bytes], hint: Hint | None, now_s: float, tenant: str = ""
    ) -> CachedPrefix | None:
        """A call arrived with a prompt of the full blocks `block_hashes`; returns the stalled prefix that it extends.

        Only of its own tenant: where cached prefixes are shared, another tenant's may have the same blocks.
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
        """The call has finished and left the blocks `block_hashes`; its prefix waits to be extended."""
        prefix = self.remove(request_id)
        if prefix is None or not block_hashes:
            return None
        stalled = CachedPrefix(request_id, block_hashes, prefix.hint, "stalled", now_s, prefix.tenant)
        self._add(stalled)
        return stalled

    def remove(self, request_id: str) -> CachedPrefix | None:
        """Remove this prefix from the index; returns it, or None."""
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
        """The prefixes of a session."""
        return [self.by_id[name] for name in self._by_session.get(session, ())]

    def subagents_of(self, prefix: CachedPrefix) -> list[CachedPrefix]:
        """Prefixes of the sub-agents that work inside a tool call of this prefix's call."""
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
        """The blocks of a removed prefix that no other prefix contains, from the tail."""
        return [key for key in reversed(prefix.block_hashes) if key not in self.refcounts]

    def overflow(self) -> Iterable[CachedPrefix]:
        """Stalled prefixes beyond the bound, the oldest of the tenant with most; the caller removes them."""
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
        """The stalled prefix of the same session with the largest overlap with `block_hashes`.

        Clients often re-tokenise the answer, so the next prompt matches the blocks of the prompt but not the answer's.
        """
        best, best_share = None, MIN_OVERLAP
        for prefix in self.of_session(hint.session) if hint is not None else ():
            if prefix.phase == "stalled":
                share = _common(prefix.block_hashes, block_hashes) / len(prefix.block_hashes)
                if share >= best_share:
                    best, best_share = prefix, share
        return best


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Number of blocks that two prefixes share: a hash stands for all blocks before it."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda place: one[place] != other[place])
