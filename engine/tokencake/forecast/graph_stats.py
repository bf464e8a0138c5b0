"""What has been learned of the graphs that applications run? How long nodes take, how often they come, what follows.

A graph that nobody has described is learned from the order of its calls. Whoever names no graph is known by the agent
that began the application, and its nodes by their agents and names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tokencake.forecast.fair_lru import FairLRU
from tokencake.forecast.roles import NodeKey
from tokencake.forecast.topology import GraphTopology, remaining_s, topology_of
from tokencake.protocol import Graph

_MAX_NODES: Final = 8_192
_MAX_GRAPHS: Final = 64
_MAX_EDGES: Final = 256
"""Edges learned of one graph; a graph with more of them has no order."""
_RATE: Final = 0.2
_FIRST_CALL_S: Final = 5.0
"""A call takes so long as far as is known before the first one has ended."""
_STALE: Final = 64
"""Calls after which the ways of a graph are measured anew; in the beginning, each time their number has doubled."""
_RECENT: Final = 64
"""Applications after which those before count for half."""
_ENOUGH: Final = 16
"""Calls of a graph that have ended before its order, and the absence of a node among them, mean something."""
_RARE: Final = 0.1
"""Of the calls of a node: what follows less often is no edge of a learned graph."""


@dataclass(slots=True)
class _Node:
    """What the calls of one place are like, on average of late."""

    call_s: float
    gap_s: float = 0.0
    """From the end of a call to the begin of what waits for it: tools, people, code."""
    calls: float = 0.0
    apps: float = 0.0
    """Applications that had these calls."""

    @property
    def visits(self) -> float:
        """Calls of one application."""
        return self.calls / max(1.0, self.apps)


@dataclass(frozen=True, slots=True)
class PathCosts:
    """One graph, measured."""

    topology: GraphTopology
    remaining_s: dict[str, float]
    """Calls and what is between them."""
    service_s: dict[str, float]
    """Calls alone."""
    is_described: bool

    def cycle(self, node: str) -> tuple[str, ...]:
        """The nodes that go round with it, itself included; none where it comes once."""
        cycle = self.topology.sccs[self.topology.scc_of[node]]
        return cycle if node in self.topology.descendants[node] else ()


@dataclass(slots=True)
class _Measured:
    path_costs: PathCosts | None
    graph: Graph | None
    at: int


@dataclass(slots=True)
class GraphStatsMemory:
    """What all tenants' lore takes, bounded and shared fairly; what was not seen for longest is forgotten."""

    nodes: FairLRU[NodeKey, _Node] = field(default_factory=lambda: FairLRU(_MAX_NODES))
    calls: FairLRU[str, Counter[str]] = field(default_factory=lambda: FairLRU(_MAX_NODES))
    """Of each graph: calls that ended, by node."""
    counts: Counter[str] = field(default_factory=Counter)
    """All calls of each of these graphs."""
    edges: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    measured: FairLRU[str, _Measured] = field(default_factory=lambda: FairLRU(_MAX_GRAPHS))


class GraphStats:
    """Everything learned of the graphs of one tenant, whose names no other tenant's have.

    Args:
        graph_named: the description of a graph, where there is one.
        memory: where it is kept, beside other tenants'.
        tenant: whose it is.
    """

    def __init__(
        self, graph_named: Callable[[str], Graph | None], memory: GraphStatsMemory | None = None, tenant: str = ""
    ) -> None:
        self.call_s = _FIRST_CALL_S
        """Mean seconds of a call from its first slot to its end."""
        self._graph_named = graph_named
        self._memory = memory or GraphStatsMemory()
        self._tenant = tenant

    # --- learning -----------------------------------------------------------------------------------

    def learn_call(self, node_key: NodeKey, took_s: float, visits: int) -> None:
        """A call of this place took so long, and was its application's so many-th."""
        self.call_s += _RATE * (took_s - self.call_s)
        memory = self._memory
        node = memory.nodes.get(node_key) or _Node(took_s)
        node.call_s += _RATE * (took_s - node.call_s)
        node.calls += 1
        node.apps += visits == 1
        if node.apps > _RECENT:
            node.calls, node.apps = node.calls / 2, node.apps / 2
        memory.nodes.put(node_key, node, self._tenant)
        graph, name = node_key
        calls = memory.calls.get(graph) or Counter[str]()
        calls[name] += 1
        memory.counts[graph] += 1
        for forgotten, _ in memory.calls.put(graph, calls, self._tenant):
            memory.edges.pop(forgotten, None)
            del memory.counts[forgotten]

    def learn_successor(self, before: NodeKey, behind: NodeKey, gap_s: float | None) -> None:
        """A call came, so many seconds after the one that it had waited for had ended; None where that is a guess."""
        node = self._memory.nodes.get(before)
        if node is not None and gap_s is not None:
            node.gap_s += _RATE * (gap_s - node.gap_s)
        graph = before[0]
        if graph == behind[0] and graph in self._memory.calls and self._graph_named(graph) is None:
            edges = self._memory.edges.setdefault(graph, Counter())
            edge = before[1], behind[1]
            if edge in edges or len(edges) < _MAX_EDGES:
                edges[edge] += 1

    # --- what is known ------------------------------------------------------------------------------

    def gap_s(self, node_key: NodeKey) -> float:
        """Seconds between the end of a call of this place and what follows it."""
        node = self._memory.nodes.get(node_key)
        return 0.0 if node is None else node.gap_s

    def service_s(self, node_key: NodeKey) -> float:
        """Seconds of one call of this place."""
        node = self._memory.nodes.get(node_key)
        return self.call_s if node is None else node.call_s

    def path_costs(self, graph: str) -> PathCosts | None:
        """The graph as last measured; None while it is neither described nor learned."""
        described = self._graph_named(graph)
        memory = self._memory
        calls = memory.calls.get(graph)
        count = memory.counts[graph]
        known = memory.measured.get(graph)
        if known is None or known.graph is not described or count >= min(2 * known.at + 1, known.at + _STALE):
            path_costs = None
            if described is not None:
                before = known.path_costs if known is not None and known.graph is described else None
                topology = topology_of(described.nodes, described.edges) if before is None else before.topology
                path_costs = self._measure(graph, topology, is_described=True)
            elif calls is not None and count >= _ENOUGH:
                often = [
                    edge
                    for edge, times in memory.edges.get(graph, Counter()).items()
                    if times >= _RARE * calls[edge[0]]
                ]
                path_costs = self._measure(graph, topology_of(calls, often), is_described=False)
            known = _Measured(path_costs, described, count)
            memory.measured.put(graph, known, self._tenant)
        return known.path_costs

    def _measure(self, graph: str, topology: GraphTopology, *, is_described: bool) -> PathCosts:
        nodes, calls = self._memory.nodes, self._memory.calls.get(graph) or Counter[str]()
        is_known = self._memory.counts[graph] >= _ENOUGH and any(name in calls for name in topology.scc_of)

        def service_s(name: str) -> float:
            node = nodes.get((graph, name))
            if node is None:  # no call comes from here: code, or a branch that nobody takes
                return 0.0 if is_known else self.call_s
            return node.call_s * node.visits

        def cost_s(name: str) -> float:
            node = nodes.get((graph, name))
            return service_s(name) + (0.0 if node is None else node.gap_s * node.visits)

        return PathCosts(topology, remaining_s(topology, cost_s), remaining_s(topology, service_s), is_described)
