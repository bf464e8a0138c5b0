"""Bounded LRU mapping shared by several owners: when it is full, the owner of the most entries loses its oldest.

So no owner evicts entries of another that has fewer. With one owner it is an ordinary LRU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class FairLRU(Generic[_Key, _Value]):
    """At most `limit` entries. Reading one does not make it newer; putting it again does.

    Args:
        limit: entries of all owners together; infinite where the caller evicts.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._values: OrderedDict[_Key, _Value] = OrderedDict()
        self._owners: dict[_Key, str] = {}
        self._keys: dict[str, OrderedDict[_Key, None]] = {}
        """Of each owner, oldest first."""

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._values)

    def __contains__(self, key: _Key) -> bool:
        return key in self._values

    def items(self) -> Iterator[tuple[_Key, _Value]]:
        """All entries, oldest first."""
        yield from self._values.items()

    def get(self, key: _Key) -> _Value | None:
        """The value of `key`, or None."""
        return self._values.get(key)

    def keys_of(self, owner: str) -> Iterator[_Key]:
        """The keys of one owner, oldest first."""
        yield from self._keys.get(owner, ())

    def owner_of(self, key: _Key) -> str:
        """The owner of `key`; empty for one that is not there."""
        return self._owners.get(key, "")

    def oldest_of_most(self) -> _Key | None:
        """The oldest entry of the owner of most; None where there is none."""
        return next(iter(max(self._keys.values(), key=len, default=())), None)

    def count(self, owner: str) -> int:
        """Entries of one owner."""
        return len(self._keys.get(owner, ()))

    def put(self, key: _Key, value: _Value, owner: str = "") -> list[tuple[_Key, _Value]]:
        """Make `key` the newest entry, of `owner`; returns the evicted entries."""
        self.pop(key)
        self._values[key] = value
        self._owners[key] = owner
        self._keys.setdefault(owner, OrderedDict())[key] = None
        gone: list[tuple[_Key, _Value]] = []
        while len(self._values) > self._limit and (oldest := self.oldest_of_most()) is not None:
            gone.append((oldest, self._values[oldest]))
            self.pop(oldest)
        return gone

    def pop(self, key: _Key) -> _Value | None:
        """Take `key` out; returns its value, or None."""
        if key not in self._values:
            return None
        owner = self._owners.pop(key)
        keys = self._keys[owner]
        del keys[key]
        if not keys:
            del self._keys[owner]
        return self._values.pop(key)
