"""How far is each node of a graph from the end? In seconds along the longest path, loops entered once.

A loop costs what its nodes have been seen to cost: `cost_of` counts a node as often as an application visits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


def remaining_s(
    nodes: Iterable[str], edges: Iterable[tuple[str, str]], cost_of: Callable[[str], float]
) -> dict[str, float]:
    """Seconds from the begin of each node to the end of the graph, the node itself included.

    An edge that leads back to a node on the way to it is not followed. Takes time linear in nodes and edges.
    """
    followers: dict[str, list[str]] = {name: [] for name in nodes}
    for before, after in edges:
        followers.setdefault(before, []).append(after)
        followers.setdefault(after, [])
    found: dict[str, float] = {}
    on_way: set[str] = set()
    for root, first in followers.items():
        if root in found:
            continue
        # An explicit stack: a graph may be deeper than Python's recursion goes.
        stack = [(root, iter(first))]
        on_way.add(root)
        while stack:
            name, rest = stack[-1]
            following = next((after for after in rest if after not in on_way and after not in found), None)
            if following is not None:
                on_way.add(following)
                stack.append((following, iter(followers[following])))
                continue
            stack.pop()
            on_way.discard(name)
            found[name] = cost_of(name) + max((found[after] for after in followers[name] if after in found), default=0)
    return found
