"""How far is each node of a graph from the end, which nodes come after it, and which go round with it?

In seconds along the longest path. A loop is passed as a whole: whoever enters it still has all of it before him, and
`cost_of` counts a node as often as an application visits it, so a loop costs what its expected rounds cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GraphTopology:
    """What follows from the edges alone."""

    successors: Mapping[str, tuple[str, ...]]
    sccs: tuple[tuple[str, ...], ...]
    """Every node is in one; most are alone in theirs. What a loop leads to stands before it."""
    scc_of: Mapping[str, int]
    """The place in `sccs` of each node."""
    descendants: Mapping[str, frozenset[str]]
    """Nodes that can be reached from each node; the node itself only where it is on a cycle."""


def topology_of(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> GraphTopology:
    """Strongly connected components, ends first. Takes time linear in nodes and edges, but for `descendants`."""
    found: dict[str, list[str]] = {name: [] for name in nodes}
    for before, behind in edges:
        found.setdefault(before, []).append(behind)
        found.setdefault(behind, [])
    successors = {name: tuple(dict.fromkeys(behind)) for name, behind in found.items()}
    sccs = _components(successors)
    scc_of = {name: place for place, members in enumerate(sccs) for name in members}
    descendants: dict[str, frozenset[str]] = {}
    reached: list[frozenset[str]] = []
    for place, members in enumerate(sccs):
        out = {behind for name in members for behind in successors[name]}
        is_cycle = len(members) > 1 or members[0] in successors[members[0]]
        everything = frozenset(out.union(*(reached[scc_of[name]] for name in out if scc_of[name] != place)))
        everything = everything | frozenset(members) if is_cycle else everything
        reached.append(everything)
        descendants.update(dict.fromkeys(members, everything))
    return GraphTopology(successors, sccs, scc_of, descendants)


def remaining_s(topology: GraphTopology, cost_of: Callable[[str], float]) -> dict[str, float]:
    """Seconds from the begin of each node to the end of the graph, the node's whole loop included."""
    found: dict[str, float] = {}
    for place, members in enumerate(topology.sccs):
        exits = (behind for name in members for behind in topology.successors[name] if topology.scc_of[behind] != place)
        rest_s = max((found[behind] for behind in exits), default=0.0)
        found.update(dict.fromkeys(members, rest_s + sum(map(cost_of, members))))
    return found


def _components(successors: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Strongly connected components, each before those that lead to it (Tarjan's, with a stack of its own)."""
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
                work.append((behind, iter(successors[behind])))
            elif behind in on_path:
                low[name] = min(low[name], index[behind])
    return tuple(components)
