"""How far is each node of a graph from the end, which nodes come after it, and which go round with it?

In seconds along the longest path. A loop is passed as a whole: whoever enters it still has all of it before him, and
`cost_of` counts a node as often as an application visits it, so a loop costs what its expected rounds cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """What follows from the edges alone."""

    followers: Mapping[str, tuple[str, ...]]
    loops: tuple[tuple[str, ...], ...]
    """Every node is in one; most are alone in theirs. What a loop leads to stands before it."""
    loop_of: Mapping[str, int]
    """The place in `loops` of each node."""
    after: Mapping[str, frozenset[str]]
    """Nodes that can be reached from each node; the node itself only where it is on a cycle."""


def shape_of(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> Shape:
    """Strongly connected components, ends first. Takes time linear in nodes and edges, but for `after`."""
    found: dict[str, list[str]] = {name: [] for name in nodes}
    for before, behind in edges:
        found.setdefault(before, []).append(behind)
        found.setdefault(behind, [])
    followers = {name: tuple(dict.fromkeys(behind)) for name, behind in found.items()}
    loops = _components(followers)
    loop_of = {name: place for place, members in enumerate(loops) for name in members}
    after: dict[str, frozenset[str]] = {}
    reached: list[frozenset[str]] = []
    for place, members in enumerate(loops):
        out = {behind for name in members for behind in followers[name]}
        is_cycle = len(members) > 1 or members[0] in followers[members[0]]
        everything = frozenset(out.union(*(reached[loop_of[name]] for name in out if loop_of[name] != place)))
        everything = everything | frozenset(members) if is_cycle else everything
        reached.append(everything)
        after.update(dict.fromkeys(members, everything))
    return Shape(followers, loops, loop_of, after)


def remaining_s(shape: Shape, cost_of: Callable[[str], float]) -> dict[str, float]:
    """Seconds from the begin of each node to the end of the graph, the node's whole loop included."""
    found: dict[str, float] = {}
    for place, members in enumerate(shape.loops):
        exits = (behind for name in members for behind in shape.followers[name] if shape.loop_of[behind] != place)
        rest_s = max((found[behind] for behind in exits), default=0.0)
        found.update(dict.fromkeys(members, rest_s + sum(map(cost_of, members))))
    return found


def _components(followers: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Strongly connected components, each before those that lead to it (Tarjan's, with a stack of its own)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    components: list[tuple[str, ...]] = []
    for root in followers:
        if root in index:
            continue
        work = [(root, iter(followers[root]))]
        index[root] = low[root] = len(index)
        path.append(root)
        on_path.add(root)
        while work:
            name, rest = work[-1]
            behind = next(rest, None)
            if behind is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    start = path.index(name)
                    components.append(tuple(path[start:]))
                    on_path.difference_update(path[start:])
                    del path[start:]
            elif behind not in index:
                index[behind] = low[behind] = len(index)
                path.append(behind)
                on_path.add(behind)
                work.append((behind, iter(followers[behind])))
            elif behind in on_path:
                low[name] = min(low[name], index[behind])
    return tuple(components)
