"""Blocks of dropped prefixes, which are reused before other free blocks, oldest first.

A prefix is dropped where its call has claimed `reuse: final`, or where its session is over. A block that another
session has used, for example of a system prompt, is not among them. The end of a session is only a claim: a later
request for the blocks refutes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokencake.forecast.reuse import Claim
    from tokencake.forecast.roles import Role

_ASKED_SHARE: Final = 0.5
"""A call of another session that asks for at least this share of a dropped prefix refutes the claim too."""


class SharedBlocks:
    """Users of each block, by lifetime, for `capacity` blocks; the least recently used are forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._users: OrderedDict[bytes, str | None] = OrderedDict()
        """The one lifetime that has used a block; None for several of them."""

    def use(self, block_hashes: Sequence[bytes], lifetime: str) -> None:
        """A call of `lifetime` has used the prefix `block_hashes`."""
        for key in reversed(block_hashes):  # the head, which is shared most, is forgotten last
            user = self._users.pop(key, lifetime)
            self._users[key] = user if user == lifetime else None
        while len(self._users) > self._capacity:
            self._users.popitem(last=False)

    def is_exclusive(self, key: bytes, lifetime: str) -> bool:
        """Whether only this lifetime is known to have used the block."""
        return self._users.get(key, lifetime) == lifetime


@dataclass(slots=True, eq=False)
class _Drop:
    """One dropped prefix."""

    role: Role
    claim: Claim
    lifetime: str
    blocks: int
    """Number of its exclusive blocks."""
    asked: int = 0
    is_refuted: bool = False


class Dropped:
    """The exclusive blocks of dropped prefixes, by hash; the oldest of more than `capacity` are forgotten."""

    def __init__(self, capacity: int, refute: Callable[[Role, Claim], None]) -> None:
        """`refute` is called for each prefix that is asked for after it was dropped."""
        self._capacity, self._refute = capacity, refute
        self._waiting: OrderedDict[bytes, _Drop] = OrderedDict()
        self._first: OrderedDict[bytes, _Drop] = OrderedDict()

    def __len__(self) -> int:
        """Blocks that have not been put first yet."""
        return len(self._waiting)

    def add(self, role: Role, claim: Claim, lifetime: str, block_hashes: Sequence[bytes]) -> None:
        """`block_hashes` are the unreferenced blocks of a dropped prefix, in the order of their reuse."""
        drop = _Drop(role, claim, lifetime, len(block_hashes))
        for key in block_hashes:
            self._first.pop(key, None)
            self._waiting.pop(key, None)
            self._waiting[key] = drop
        while len(self._waiting) + len(self._first) > self._capacity:
            (self._first or self._waiting).popitem(last=False)

    def wake(self, block_hashes: Sequence[bytes], lifetime: str) -> list[bytes]:
        """A call of `lifetime` asks for `block_hashes`: they are no longer dropped.

        Returns:
            Those that had been put first.
        """
        if not self._waiting and not self._first:
            return []
        first = []
        for key in block_hashes:
            drop = self._waiting.pop(key, None)
            if drop is None and (drop := self._first.pop(key, None)) is not None:
                first.append(key)
            if drop is not None:
                drop.asked += 1
                is_half = drop.asked >= _ASKED_SHARE * drop.blocks
                if not drop.is_refuted and (is_half or drop.lifetime == lifetime):
                    drop.is_refuted = True
                    self._refute(drop.role, drop.claim)
        return first

    def take(self) -> bytes | None:
        """The longest dropped block that was not put first yet; from now on it counts as put first."""
        if not self._waiting:
            return None
        key, drop = self._waiting.popitem(last=False)
        self._first[key] = drop
        return key

    def put_back(self, key: bytes) -> None:
        """The block cannot be put first yet."""
        if (drop := self._first.pop(key, None)) is not None:
            self._waiting[key] = drop

    def discard(self, key: bytes) -> None:
        """The block is referenced again."""
        self._first.pop(key, None)

    def is_first(self, key: bytes) -> bool:
        """Whether the block was put first."""
        return key in self._first

    def clear(self) -> None:
        """The device has been reset."""
        self._waiting.clear()
        self._first.clear()
