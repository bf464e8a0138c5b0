"""The waiting queue in the order of the last ranking.

Between `peek_request` and `pop_request` vLLM allocates blocks, so an order that followed the state of the memory would
change in between and pop another call than the one just admitted. Here ranks are frozen from one `sort` to the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from tokencake.space_scheduler.policy import Rank


class RankedQueue(RequestQueue):
    """Calls by rank. One that came after the last `sort` stands behind, one that was put back where its rank says."""

    def __init__(self) -> None:
        self._line: list[Request] = []
        self.ranks: dict[str, Rank] = {}
        """As of the last `sort`, by request."""

    def sort(self, rank_of: Callable[[Request], Rank]) -> None:
        """Rank all anew."""
        self.ranks = {request.request_id: rank_of(request) for request in self._line}
        self._line.sort(key=lambda request: self.ranks[request.request_id])

    def add_request(self, request: Request) -> None:
        """Put it behind all others."""
        self._line.append(request)

    def pop_request(self) -> Request:
        """Take the first."""
        return self._line.pop(0)

    def peek_request(self) -> Request:
        """See the first."""
        return self._line[0]

    def prepend_request(self, request: Request) -> None:
        """Put it back: where its rank says, before all others where it has none."""
        rank = self.ranks.get(request.request_id)
        place = 0 if rank is None else bisect_left(self._line, rank, key=self._rank_in_line)
        self._line.insert(place, request)

    def _rank_in_line(self, request: Request) -> Rank:
        # Those that came after the last sort stand behind.
        return self.ranks.get(request.request_id, (float("inf"),))

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put all of them back."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Take this one out."""
        self._line.remove(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take these out, those that are in."""
        leaving = {request.request_id for request in requests}
        self._line = [request for request in self._line if request.request_id not in leaving]

    def __bool__(self) -> bool:
        return bool(self._line)

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self._line))
