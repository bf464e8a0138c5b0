"""Statistics of the graphs that applications run: seconds per call of each node, visits per application, edges.

A graph without a `graph` event is learned from the order of its calls. An application whose hints name no graph is
identified by the agent of its first call, and its nodes by agent and name.
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
"""Maximum number of learned edges of one graph."""
_RATE: Final = 0.2
_FIRST_CALL_S: Final = 5.0
"""Seconds of a call until the first one has ended."""
_STALE: Final = 64
"""Calls after which the path costs of a graph are measured again; at first, each time their number has doubled."""
_RECENT: Final = 64
"""Applications after which the counts are halved."""
_ENOUGH: Final = 16
"""Ended calls of a graph from which on its order, and the absence of a node, count."""
_RARE: Final = 0.1
"""Minimum share of a node's calls that an edge of a learned graph follows."""


@dataclass(slots=True)
class _Node:
    """Fading means over the calls of one node."""

    call_s: float
    gap_s: float = 0.0
    """From the end of a call to the start of the call that waits for it: tools, people, code."""
    calls: float = 0.0
    apps: float = 0.0
    """Applications that had these calls."""

    @property
    def visits(self) -> float:
        """Calls of one application."""
        return self.calls / max(1.0, self.apps)


@dataclass(frozen=True, slots=True)
class PathCosts:
    """Seconds along the longest path from each node of one graph to its end."""

    topology: GraphTopology
    remaining_s: dict[str, float]
    """Calls and the gaps between them."""
    service_s: dict[str, float]
    """Calls alone."""
    is_described: bool

    def cycle(self, node: str) -> tuple[str, ...]:
        """The nodes on a cycle with it, itself included; none where it is on no cycle."""
        cycle = self.topology.sccs[self.topology.scc_of[node]]
        return cycle if node in self.topology.descendants[node] else ()


@dataclass(slots=True)
class _Measured:
    path_costs: PathCosts | None
    graph: Graph | None
    at: int


@dataclass(slots=True)
class GraphStatsMemory:
    """The statistics of all tenants, in bounded memory that is shared fairly; the least recently seen is forgotten."""

    nodes: FairLRU[NodeKey, _Node] = field(default_factory=lambda: FairLRU(_MAX_NODES))
    calls: FairLRU[str, Counter[str]] = field(default_factory=lambda: FairLRU(_MAX_NODES))
    """Of each graph: calls that ended, by node."""
    counts: Counter[str] = field(default_factory=Counter)
    """All calls of each of these graphs."""
    edges: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    measured: FairLRU[str, _Measured] = field(default_factory=lambda: FairLRU(_MAX_GRAPHS))


class GraphStats:
    """Statistics of the graphs of one tenant; the names of its graphs are scoped by tenant.

    Args:
        graph_named: the `graph` event of a graph, where there is one.
        memory: where the statistics of all tenants are kept.
        tenant: prefix of the tenant.
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
        """Record the duration of one call of this node and its ordinal within the application."""
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

    def learn_successor(self, before: NodeKey, after: NodeKey, gap_s: float | None) -> None:
        """Record an edge, and the gap in seconds between the two calls; None where the first call is a guess."""
        node = self._memory.nodes.get(before)
        if node is not None and gap_s is not None:
            node.gap_s += _RATE * (gap_s - node.gap_s)
        graph = before[0]
        if graph == after[0] and graph in self._memory.calls and self._graph_named(graph) is None:
            edges = self._memory.edges.setdefault(graph, Counter())
            edge = before[1], after[1]
            if edge in edges or len(edges) < _MAX_EDGES:
                edges[edge] += 1

    # --- what is known ------------------------------------------------------------------------------

    def gap_s(self, node_key: NodeKey) -> float:
        """Seconds between the end of a call of this node and the call that follows it."""
        node = self._memory.nodes.get(node_key)
        return 0.0 if node is None else node.gap_s

    def service_s(self, node_key: NodeKey) -> float:
        """Seconds of one call of this node."""
        node = self._memory.nodes.get(node_key)
        return self.call_s if node is None else node.call_s

    def path_costs(self, graph: str) -> PathCosts | None:
        """The path costs of the graph as last measured; None while it is neither described nor learned."""
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
            if node is None:  # a node without calls: code, or a branch that is not taken
                return 0.0 if is_known else self.call_s
            return node.call_s * node.visits

        def cost_s(name: str) -> float:
            node = nodes.get((graph, name))
            return service_s(name) + (0.0 if node is None else node.gap_s * node.visits)

        return PathCosts(topology, remaining_s(topology, cost_s), remaining_s(topology, service_s), is_described)
