"""Index of the KV blocks in host memory, with eviction.

A tree of blocks by hash: a block is only in the index while the block before it is, so a match is always a prefix. A
prefix shared by many agents is stored once. Blocks are evicted from the ends of prefixes, the farthest next use first;
a block that a copy reads or writes is pinned until the copy is over. Nothing is copied here: slots are numbers.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeAlias


@dataclass(slots=True, eq=False)
class HostBlock:
    """One block in host memory, or on its way there."""

    key: bytes
    slot: int
    parent: HostBlock | None
    used_s: float
    children: int = 0
    pins: int = 0
    was_hit: bool = False
    """A later call found it on the device: the copy was not needed so far."""
    was_read: bool = False
    """It was copied back."""
    is_ready: bool = False
    is_gone: bool = False
    """Removed from the index; the slot stays taken while a copy uses it."""


Distance: TypeAlias = Callable[[HostBlock], float]
"""Distance of the next use of a block at the end of a prefix; `inf` where none is expected. The farthest goes first."""


def leading(block_hashes: Sequence[bytes], is_here: Callable[[bytes], bool]) -> int:
    """Number of leading blocks that are here, by bisection: where prefixes are only shortened at their end."""
    return bisect_left(block_hashes, True, key=lambda key: not is_here(key))


class HostTier:
    """The index of `capacity` slots. Not thread-safe: it lives on the engine loop."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.on_evict: Callable[[HostBlock], None] = lambda block: None  # noqa: ARG005  # until it is set
        self._blocks: dict[bytes, HostBlock] = {}
        self._ends: dict[bytes, HostBlock] = {}
        """Blocks without a child: the candidates of eviction."""
        self._free: list[int] = []
        """Slots that were used before."""
        self._fresh = 0
        """The first slot that was never used: a large capacity costs nothing until it is filled."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def free_slots(self) -> int:
        """Slots that hold nothing and that no copy uses."""
        return len(self._free) + self.capacity - self._fresh

    # --- look ---------------------------------------------------------------------------------------

    def known(self, block_hashes: Sequence[bytes]) -> int:
        """Number of leading blocks of the prefix `block_hashes` that are here or on their way here."""
        return leading(block_hashes, self._blocks.__contains__)

    def loadable(self, block_hashes: Sequence[bytes]) -> int:
        """Number of leading blocks of the prefix `block_hashes` that can be loaded now: they are stored in order."""
        return leading(block_hashes, lambda key: (block := self._blocks.get(key)) is not None and block.is_ready)

    def ready(self, block_hashes: Sequence[bytes]) -> list[HostBlock]:
        """The leading blocks of `block_hashes`, any part of a prefix, that can be loaded now."""
        found = []
        for key in block_hashes:
            block = self._blocks.get(key)
            if block is None or not block.is_ready:
                break
            found.append(block)
        return found

    # --- store --------------------------------------------------------------------------------------

    def reserve(
        self, block_hashes: Sequence[bytes], now_s: float, distance: Distance, *, own_distance: float = -inf
    ) -> list[HostBlock]:
        """Take slots for the blocks of the prefix `block_hashes` that are not here, in order, as far as there is room.

        Blocks are evicted only where their next use is farther than `own_distance`. The returned blocks are pinned and
        not ready: copy, then `settle`.
        """
        first = self.known(block_hashes)
        missing = block_hashes[first:]
        if not missing:
            return []
        anchor = self._blocks[block_hashes[first - 1]] if first else None
        if anchor is not None:
            anchor.pins += 1  # it may be an end, and must not be evicted for its own child
        if len(missing) > self.free_slots:
            self._evict(len(missing) - self.free_slots, distance, own_distance)
        taken: list[HostBlock] = []
        parent = anchor
        for key in missing[: self.free_slots]:
            block = HostBlock(key, self._take_slot(), parent, now_s, pins=1)
            if parent is not None:
                parent.children += 1
                self._ends.pop(parent.key, None)
            self._blocks[key] = self._ends[key] = block
            taken.append(block)
            parent = block
        if anchor is not None:
            self.unpin([anchor])
        return taken

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._fresh += 1
        return self._fresh - 1

    def settle(self, blocks: Iterable[HostBlock], *, ok: bool) -> None:
        """The copies into `blocks` are over. Failed ones are forgotten, with their descendants."""
        blocks = list(blocks)
        for block in blocks:
            block.is_ready = ok and not block.is_gone
        self.unpin(blocks)
        if not ok:
            self.forget(blocks)

    def _evict(self, count: int, distance: Distance, own_distance: float) -> None:
        heap = [(-distance(end), end.used_s, end.slot, end) for end in self._ends.values() if not end.pins]
        heapq.heapify(heap)
        while count and heap:
            negative, _, _, end = heapq.heappop(heap)
            if -negative <= own_distance:
                break
            parent = end.parent
            self._remove(end)
            self.on_evict(end)
            count -= 1
            if parent is not None and not parent.children and not parent.pins:
                # The block before the end is needed no later than the end.
                nearest = max(negative, -distance(parent))
                heapq.heappush(heap, (nearest, parent.used_s, parent.slot, parent))

    # --- use ----------------------------------------------------------------------------------------

    def pin(self, blocks: Iterable[HostBlock]) -> None:
        """Protect `blocks` from eviction until they are unpinned."""
        for block in blocks:
            block.pins += 1

    def unpin(self, blocks: Iterable[HostBlock]) -> None:
        """Undo one pin of each."""
        for block in blocks:
            block.pins -= 1
            if not block.pins and block.is_gone:
                self._free.append(block.slot)

    def touch(self, block_hashes: Iterable[bytes], now_s: float) -> None:
        """The prefix `block_hashes` was used now."""
        for key in block_hashes:
            block = self._blocks.get(key)
            if block is None:
                break
            block.used_s = now_s

    def hit(self, block_hashes: Sequence[bytes]) -> None:
        """A call found the prefix `block_hashes` on the device."""
        known = self.known(block_hashes)
        block = self._blocks[block_hashes[known - 1]] if known else None
        while block is not None and not block.was_hit:  # the blocks before a hit block are hit too
            block.was_hit = True
            block = block.parent

    # --- forget -------------------------------------------------------------------------------------

    def forget(self, blocks: Iterable[HostBlock]) -> None:
        """Remove `blocks` and their descendants from the index, for example because a copy of them failed."""
        doomed: set[HostBlock | None] = {block for block in blocks if not block.is_gone}
        if doomed:
            for block in list(self._blocks.values()):  # parents come before their children
                if block in doomed or block.parent in doomed:
                    doomed.add(block)
                    self._remove(block)

    def reset(self) -> None:
        """Forget everything; slots under a copy are freed when it is over."""
        for block in list(self._blocks.values()):
            self._remove(block)

    def _remove(self, block: HostBlock) -> None:
        del self._blocks[block.key]
        self._ends.pop(block.key, None)
        block.is_gone, block.is_ready = True, False
        if (parent := block.parent) is not None:
            parent.children -= 1
            if not parent.children and not parent.is_gone:
                self._ends[parent.key] = parent
        if not block.pins:
            self._free.append(block.slot)

    def broken_rules(self) -> list[str]:
        """The invariants that do not hold; for tests."""
        children: dict[bytes, int] = dict.fromkeys(self._blocks, 0)
        for block in self._blocks.values():
            if block.parent is not None and block.parent.key in children:
                children[block.parent.key] += 1
        slots = [block.slot for block in self._blocks.values()] + self._free
        rules = {
            "a slot has two owners": len(slots) == len(set(slots)),
            "there are more slots than memory": len(slots) <= self._fresh <= self.capacity,
            "a block is here without the one before it": all(
                block.parent is None or self._blocks.get(block.parent.key) is block.parent
                for block in self._blocks.values()
            ),
            "children are miscounted": all(self._blocks[key].children == count for key, count in children.items()),
            "the ends of prefixes are wrong": {key for key, count in children.items() if not count} == set(self._ends),
            "a forgotten block is in the index": not any(block.is_gone for block in self._blocks.values()),
        }
        return [rule for rule, holds in rules.items() if not holds]
