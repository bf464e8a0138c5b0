"""Dependencies between the calls of an application: depth, remaining path, joins and fan-out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokencake_sim.workload.model import Node


class CycleError(ValueError):
    """The nodes wait for each other. `nodes` lists those that can never start."""

    def __init__(self, nodes: tuple[str, ...]) -> None:
        super().__init__(f"waits for itself: {', '.join(nodes)} form a cycle")
        self.nodes = nodes


@dataclass(frozen=True, slots=True)
class NodePosition:
    """Where a node stands in its application; counts are of LLM calls on the longest path."""

    depth: int
    remaining: int
    remaining_tokens: int
    """Output tokens on the way to the end, this node's included."""
    out_degree: int
    fan_out: int
    fan_index: int
    is_critical: bool


def waits_for(nodes: tuple[Node, ...]) -> dict[str, tuple[str, ...]]:
    """The calls that must have ended before each node's own begins, sub-agents included."""
    children: dict[str, list[str]] = {}
    for node in nodes:
        if node.parent is not None:
            children.setdefault(node.parent, []).append(node.id)

    def ends_of(name: str) -> list[str]:
        return [name, *(end for child in children.get(name, []) for end in ends_of(child))]

    return {
        node.id: tuple(
            dict.fromkeys(
                [end for name in (*node.predecessors, *node.after) for end in ends_of(name)]
                + ([node.parent] if node.parent is not None else [])
            )
        )
        for node in nodes
    }


def topological(waits: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The nodes in an order in which they could run, first given first.

    Raises:
        CycleError: some wait for each other.
    """
    order: list[str] = []
    left = dict(waits)
    done: set[str] = set()
    while left:
        ready = [name for name, needed in left.items() if done.issuperset(needed)]
        if not ready:
            raise CycleError(tuple(left))
        order += ready
        done.update(ready)
        for name in ready:
            del left[name]
    return tuple(order)


def places(nodes: tuple[Node, ...]) -> dict[str, NodePosition]:
    """The place of every node; `nodes` must be free of cycles."""
    waits = waits_for(nodes)
    by_id = {node.id: node for node in nodes}
    order = topological(waits)
    followers: dict[str, list[str]] = {name: [] for name in order}
    depth: dict[str, int] = {}
    for name in order:
        for needed in waits[name]:
            followers[needed].append(name)
        depth[name] = (not by_id[name].is_local) + max((depth[n] for n in waits[name]), default=0)
    remaining: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for name in reversed(order):
        node = by_id[name]
        remaining[name] = (not node.is_local) + max((remaining[n] for n in followers[name]), default=0)
        tokens[name] = node.output_tokens + max((tokens[n] for n in followers[name]), default=0)
    longest = max((depth[name] + remaining[name] - (not by_id[name].is_local) for name in order), default=0)
    fans = Counter(_origin(node) for node in nodes)
    seen: Counter[tuple[object, ...]] = Counter()
    found: dict[str, NodePosition] = {}
    for node in nodes:
        on_longest = depth[node.id] + remaining[node.id] - (not node.is_local) == longest
        found[node.id] = NodePosition(
            depth=depth[node.id],
            remaining=remaining[node.id],
            remaining_tokens=tokens[node.id],
            out_degree=len(followers[node.id]),
            fan_out=fans[_origin(node)],
            fan_index=seen[_origin(node)],
            is_critical=on_longest if node.critical is None else node.critical,
        )
        seen[_origin(node)] += 1
    return found


def _origin(node: Node) -> tuple[object, ...]:
    return (node.parent, node.predecessors, node.after)


def chains(nodes: tuple[Node, ...]) -> dict[str, str]:
    """The first node of the chain that each node belongs to.

    A chain is a run of nodes each of which extends the whole context of the one before. Where several extend one
    context, or an agent begins inside a tool call, each begins a chain of its own.
    """
    by_id = {node.id: node for node in nodes}
    extends = {
        node.id: node.predecessors[0]
        for node in nodes
        if node.predecessors and node.prefix is None and by_id[node.predecessors[0]].parent == node.parent
    }
    extenders = Counter(extends.values())
    heads: dict[str, str] = {}
    for name in topological(waits_for(nodes)):
        before = extends.get(name)
        heads[name] = heads[before] if before is not None and extenders[before] == 1 else name
    return heads
