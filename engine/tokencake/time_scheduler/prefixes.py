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

MAX_CHAINS: Final = 4_096
KIN_SHARE: Final = 0.5
"""A call that shares at least so much of a stalled chain of its session is taken for the one that extends it."""


@dataclass(slots=True, eq=False)
class Chain:
    """One prefix somebody will want, from its head on."""

    id: str
    """The request's id."""
    keys: Sequence[bytes]
    hint: Hint | None
    phase: Phase
    since_s: float
    tenant: str = ""
    """Prefix of its tenant; empty where none is known."""
    heirs_left: int | None = None
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

    def rest_s(self, now_s: float) -> float:
        """Until the agent is back, in the middle of the forecast. Once overdue, it lasts about as long again."""
        return abs(self.back_s - now_s)


@dataclass(slots=True)
class Chains:
    """All chains of one engine, in bounded memory."""

    by_id: OrderedDict[str, Chain] = field(default_factory=OrderedDict)
    wanted: dict[bytes, int] = field(default_factory=dict)
    """By how many chains each block is wanted."""
    _stalled_at: dict[bytes, list[Chain]] = field(default_factory=dict)
    """Stalled chains by their last block."""
    _by_session: dict[str, set[str]] = field(default_factory=dict)
    _hired: dict[str, set[str]] = field(default_factory=dict)
    """Chains of sub-agents by the call inside which they work."""

    def __iter__(self) -> Iterator[Chain]:
        return iter(self.by_id.values())

    def arrive(
        self, request_id: str, keys: Sequence[bytes], hint: Hint | None, now_s: float, tenant: str = ""
    ) -> Chain | None:
        """A call came with a prompt of the full blocks `keys`; returns the stalled chain that it extends.

        Of its own tenant: where cached prefixes are shared, another's may have the same blocks.
        """
        tenant = hint.tenant if hint is not None else tenant
        parent = self._parent(keys, tenant) or self._kin(keys, hint)
        self.remove(request_id)
        self._add(Chain(request_id, keys, hint, "waiting", now_s, tenant))
        if parent is not None:
            if parent.heirs_left is None:
                parent.heirs_left = (hint.fan_out if hint else None) or 1
            parent.heirs_left -= 1
            if parent.heirs_left <= 0:
                self.remove(parent.id)
        return parent

    def give_way(self, chain: Chain, keys: Sequence[bytes]) -> None:
        """A running call has lost its blocks and waits: it will want all that it had computed, the full blocks `keys`.

        With what it had written, which its prompt did not name: else nobody would seem to want that.
        """
        for key in keys[len(chain.keys) :]:
            self.wanted[key] = self.wanted.get(key, 0) + 1
        if len(keys) > len(chain.keys):
            chain.keys = keys
        chain.phase = "waiting"

    def stall(self, request_id: str, keys: Sequence[bytes], now_s: float) -> Chain | None:
        """The call is over and left the blocks `keys`; its chain waits for those who extend it."""
        chain = self.remove(request_id)
        if chain is None or not keys:
            return None
        stalled = Chain(request_id, keys, chain.hint, "stalled", now_s, chain.tenant)
        self._add(stalled)
        return stalled

    def remove(self, request_id: str) -> Chain | None:
        """Nobody wants this chain any more."""
        chain = self.by_id.pop(request_id, None)
        if chain is None:
            return None
        for key in chain.keys:
            left = self.wanted[key] - 1
            if left:
                self.wanted[key] = left
            else:
                del self.wanted[key]
        if chain.phase == "stalled":
            ends = self._stalled_at[chain.keys[-1]]
            ends.remove(chain)
            if not ends:
                del self._stalled_at[chain.keys[-1]]
        if chain.hint is not None:
            names = self._by_session[chain.hint.session]
            names.discard(request_id)
            if not names:
                del self._by_session[chain.hint.session]
            if chain.hint.parent_call is not None:
                hired = self._hired[chain.hint.parent_call]
                hired.discard(request_id)
                if not hired:
                    del self._hired[chain.hint.parent_call]
        return chain

    def of_session(self, session: str) -> list[Chain]:
        """Its chains."""
        return [self.by_id[name] for name in self._by_session.get(session, ())]

    def hired_by(self, chain: Chain) -> list[Chain]:
        """Those of the sub-agents that work inside a tool call of this chain's call."""
        call = (chain.hint.call if chain.hint else None) or chain.id
        return [self.by_id[name] for name in self._hired.get(call, ())]

    def siblings_of(self, chain: Chain) -> list[Chain]:
        """The other branches of its application that feed the same join."""
        hint = chain.hint
        if hint is None or hint.join is None or hint.app is None:
            return []
        return [
            other
            for other in self
            if other.hint is not None
            and (other.hint.app, other.hint.join) == (hint.app, hint.join)
            and other.hint.session != hint.session
        ]

    def dead(self, chain: Chain) -> list[bytes]:
        """The blocks of a removed chain that nobody else wants, from the tail."""
        return [key for key in reversed(chain.keys) if key not in self.wanted]

    def overflow(self) -> Iterable[Chain]:
        """Stalled chains beyond the bound, the oldest of the tenant with most; the caller removes them."""
        surplus = len(self.by_id) - MAX_CHAINS
        if surplus <= 0:
            return []
        stalled: dict[str, deque[Chain]] = {}
        for chain in self:
            if chain.phase == "stalled":
                stalled.setdefault(chain.tenant, deque()).append(chain)
        most = (max(stalled.values(), key=len, default=()) for _ in range(surplus))
        return [chains.popleft() for chains in most if chains]

    def _add(self, chain: Chain) -> None:
        self.by_id[chain.id] = chain
        for key in chain.keys:
            self.wanted[key] = self.wanted.get(key, 0) + 1
        if chain.phase == "stalled":
            self._stalled_at.setdefault(chain.keys[-1], []).append(chain)
        if chain.hint is not None:
            self._by_session.setdefault(chain.hint.session, set()).add(chain.id)
            if chain.hint.parent_call is not None:
                self._hired.setdefault(chain.hint.parent_call, set()).add(chain.id)

    def _parent(self, keys: Sequence[bytes], tenant: str) -> Chain | None:
        if not self._stalled_at:
            return None
        for key in reversed(keys):
            for chain in self._stalled_at.get(key, ()):
                if chain.tenant == tenant:
                    return chain
        return None

    def _kin(self, keys: Sequence[bytes], hint: Hint | None) -> Chain | None:
        """The stalled chain of the same session that `keys` shares most of.

        An answer often comes back in other tokens than it was given in: then the prompt is extended, the answer is not.
        """
        best, best_share = None, KIN_SHARE
        for chain in self.of_session(hint.session) if hint is not None else ():
            if chain.phase == "stalled":
                share = _common(chain.keys, keys) / len(chain.keys)
                if share >= best_share:
                    best, best_share = chain, share
        return best


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Blocks that two chains share: a hash stands for all that is before it."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda place: one[place] != other[place])
