"""Records in the order of their time, read in pages from the newest on, with a bound on the cost of a page."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

_Item = TypeVar("_Item")

TICK_S: Final = 1e-5
"""Minimum distance between the times of two records: a page ends at a time, and every record is in one page. Wide
enough for seconds since the epoch in a float."""
MAX_VISITED: Final = 2_000
"""Records examined for one page."""
MAX_WEIGHT: Final = 2_000
"""Total weight of the records of one page; a single one may weigh more."""


def after(now_s: float, last_s: float) -> float:
    """The time of a record that arrives at `now_s` after one of `last_s`."""
    return max(now_s, last_s + TICK_S)


@dataclass(frozen=True, slots=True)
class Page(Generic[_Item]):
    """Some records, the newest first, and the time before which the next page begins; None where there is no more."""

    entries: list[tuple[float, _Item]]
    next_s: float | None


def page_of(
    newest_first: Iterable[tuple[float, _Item | None]],
    limit: int,
    is_wanted: Callable[[_Item], bool] = lambda item: True,  # noqa: ARG005  # all of them
    weight: Callable[[_Item], int] = lambda item: 1,  # noqa: ARG005  # as much as any other
) -> Page[_Item]:
    """The first page of records with their times; a record that is None is gone.

    A page may have fewer than `limit` records, or none, and not be the last: `MAX_VISITED` were examined, or those
    found weigh `MAX_WEIGHT`.
    """
    found: list[tuple[float, _Item]] = []
    left = MAX_WEIGHT
    last_s: float | None = None
    for visited, (time_s, item) in enumerate(newest_first):
        is_full = len(found) >= limit or visited >= MAX_VISITED
        wanted = None if is_full or item is None or not is_wanted(item) else item
        if is_full or (found and wanted is not None and weight(wanted) > left):
            return Page(found, last_s)
        if wanted is not None:
            found.append((time_s, wanted))
            left -= weight(wanted)
        last_s = time_s
    return Page(found, None)


class Timeline(Generic[_Item]):
    """Records by their time, which grows from one to the next.

    A record that is taken out leaves a gap; gaps are closed when they are more than half. So `add` and `remove` cost
    O(log n), amortised, and to begin a page anywhere as well.
    """

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._items: list[_Item | None] = []
        self._gone = 0

    def add(self, time_s: float, item: _Item) -> None:
        """`time_s` comes from `after`."""
        self._times_s.append(time_s)
        self._items.append(item)

    def remove(self, time_s: float) -> None:
        """Take out the record of this time."""
        self._items[bisect_left(self._times_s, time_s)] = None
        self._gone += 1
        if 2 * self._gone > len(self._items):
            kept = [(when_s, item) for when_s, item in zip(self._times_s, self._items, strict=True) if item is not None]
            self._times_s, self._items = [when_s for when_s, _ in kept], [item for _, item in kept]
            self._gone = 0

    def newest_first(self, before_s: float | None = None) -> Iterator[tuple[float, _Item | None]]:
        """Records, or gaps, of times before `before_s`."""
        end = len(self._items) if before_s is None else bisect_left(self._times_s, before_s - TICK_S / 4)
        return ((self._times_s[place], self._items[place]) for place in range(end - 1, -1, -1))
