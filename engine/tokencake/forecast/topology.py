"""Topology of a graph: successors, strongly connected components, descendants, and longest paths to the end.

A cycle counts as a whole: at each of its nodes all of it remains, and `cost_of` counts a node as often as an
application visits it, so that a cycle costs what its expected rounds cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GraphTopology:
    """What follows from the edges alone."""

    successors: Mapping[str, tuple[str, ...]]
    sccs: tuple[tuple[str, ...], ...]
    """Strongly connected components, each after those that it leads to. Every node is in one, most are alone in it."""
    scc_of: Mapping[str, int]
    """Index in `sccs` of each node."""
    descendants: Mapping[str, frozenset[str]]
    """Nodes that can be reached from each node; the node itself only where it is on a cycle."""


def topology_of(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> GraphTopology:
    """The topology of a graph. Time is linear in nodes and edges, but for `descendants`."""
    found: dict[str, list[str]] = {name: [] for name in nodes}
    for before, successor in edges:
        found.setdefault(before, []).append(successor)
        found.setdefault(successor, [])
    successors = {name: tuple(dict.fromkeys(successor)) for name, successor in found.items()}
    sccs = _components(successors)
    scc_of = {name: number for number, members in enumerate(sccs) for name in members}
    descendants: dict[str, frozenset[str]] = {}
    reached: list[frozenset[str]] = []
    for number, members in enumerate(sccs):
        out = {successor for name in members for successor in successors[name]}
        is_cycle = len(members) > 1 or members[0] in successors[members[0]]
        everything = frozenset(out.union(*(reached[scc_of[name]] for name in out if scc_of[name] != number)))
        everything = everything | frozenset(members) if is_cycle else everything
        reached.append(everything)
        descendants.update(dict.fromkeys(members, everything))
    return GraphTopology(successors, sccs, scc_of, descendants)


def remaining_s(topology: GraphTopology, cost_of: Callable[[str], float]) -> dict[str, float]:
    """Seconds from the start of each node to the end of the graph, the node's whole cycle included."""
    found: dict[str, float] = {}
    for number, members in enumerate(topology.sccs):
        exits = (
            successor
            for name in members
            for successor in topology.successors[name]
            if topology.scc_of[successor] != number
        )
        after_s = max((found[name] for name in exits), default=0.0)
        found.update(dict.fromkeys(members, after_s + sum(map(cost_of, members))))
    return found


def _components(successors: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Strongly connected components, each before those that lead to it (Tarjan's algorithm, iterative)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    components: list[tuple[str, ...]] = []
    for root in successors:
        if root in index:
            continue
        work = [(root, iter(successors[root]))]
        index[root] = low[root] = len(index)
        path.append(root)
        on_path.add(root)
        while work:
            name, unvisited = work[-1]
            successor = next(unvisited, None)
            if successor is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    start = path.index(name)
                    components.append(tuple(path[start:]))
                    on_path.difference_update(path[start:])
                    del path[start:]
            elif successor not in index:
                index[successor] = low[successor] = len(index)
                path.append(successor)
                on_path.add(successor)
                work.append((successor, iter(successors[successor])))
            elif successor in on_path:
                low[name] = min(low[name], index[successor])
    return tuple(components)
