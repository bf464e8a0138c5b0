"""Blocks in the host memory of the baseline, least recently used first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.kv_cache_utils import BlockHash


class LruHostCache:
    """Which blocks the host holds, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evicted = 0
        self._is_ready: OrderedDict[BlockHash, bool] = OrderedDict()
        """False while the block is on its way here."""
        self._pins: Counter[BlockHash] = Counter()

    def has(self, key: BlockHash) -> bool:
        """Whether the block can be loaded."""
        return self._is_ready.get(key, False)

    def is_known(self, key: BlockHash) -> bool:
        """Whether the block is here or on its way here."""
        return key in self._is_ready

    def touch(self, keys: Sequence[BlockHash]) -> None:
        """Make `keys`, a chain from its head on, the most recently used; its tail will go before its head."""
        for key in reversed(keys):
            if key in self._is_ready:
                self._is_ready.move_to_end(key)

    def reserve(self, keys: Sequence[BlockHash]) -> int:
        """Make room for as many of `keys` as can be had, in order; returns how many."""
        for count, key in enumerate(keys):
            if len(self._is_ready) >= self.capacity and not self._evict_one(set(keys)):
                return count
            self._is_ready[key] = False
            self._pins[key] += 1
        return len(keys)

    def _evict_one(self, spared: set[BlockHash]) -> bool:
        for key in self._is_ready:
            if not self._pins[key] and key not in spared:
                del self._is_ready[key]
                self.evicted += 1
                return True
        return False

    def pin(self, keys: Iterable[BlockHash]) -> None:
        """Keep `keys` until they are unpinned."""
        self._pins.update(keys)

    def unpin(self, keys: Iterable[BlockHash]) -> None:
        """Undo one `pin` or `reserve` of each key."""
        for key in keys:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]

    def arrive(self, keys: Iterable[BlockHash]) -> None:
        """The copies to the host are done."""
        for key in keys:
            self._is_ready[key] = True

    def __len__(self) -> int:
        return len(self._is_ready)
