"""The queue in the order of the last ranking."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tokencake_vllm.space_scheduler.ranked_queue import RankedQueue


def queue_of(*names: str) -> RankedQueue:
    queue = RankedQueue()
    for name in names:
        queue.add_request(request(name))
    return queue


def request(name: str) -> Any:
    return SimpleNamespace(request_id=name)


def order(queue: RankedQueue) -> list[str]:
    return [one.request_id for one in queue]


def rank_by(**ranks: float) -> Any:
    return lambda one: (ranks[one.request_id],)


def test_requests_stand_in_the_order_of_their_arrival_until_they_are_ranked() -> None:
    queue = queue_of("a", "b", "c")
    assert order(queue) == ["a", "b", "c"]
    queue.sort(rank_by(a=3, b=1, c=2))
    assert order(queue) == ["b", "c", "a"]
    queue.add_request(request("d"))
    assert order(queue) == ["b", "c", "a", "d"]
    assert queue.ranks == {"a": (3,), "b": (1,), "c": (2,)}


def test_the_first_is_seen_and_taken() -> None:
    queue = queue_of("a", "b")
    assert queue.peek_request().request_id == queue.pop_request().request_id == "a"
    assert queue.peek_request().request_id == "b"
    assert (len(queue), bool(queue)) == (1, True)
    queue.pop_request()
    assert (len(queue), bool(queue)) == (0, False)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_ranked_request_is_put_back_where_it_was(name: str) -> None:
    queue = queue_of("a", "b", "c")
    queue.sort(rank_by(a=1, b=2, c=3))
    queue.add_request(request("new"))
    queue.remove_request(next(one for one in queue if one.request_id == name))
    queue.prepend_request(request(name))

    assert order(queue) == ["a", "b", "c", "new"]


def test_a_request_without_a_rank_is_put_back_before_all_others() -> None:
    queue = queue_of("a", "b")
    queue.sort(rank_by(a=1, b=2))
    queue.prepend_request(request("new"))

    assert order(queue) == ["new", "a", "b"]


def test_several_are_put_back_and_taken_out() -> None:
    queue = queue_of("a", "b", "c", "d")
    queue.sort(rank_by(a=1, b=2, c=3, d=4))
    queue.remove_requests([request("a"), request("c"), request("unknown")])
    assert order(queue) == ["b", "d"]
    queue.prepend_requests([request("c"), request("a")])
    assert order(queue) == ["a", "b", "c", "d"]
