"""Hints and graphs that the simulated clients send, as the wire contract has them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from tokencake.protocol import Graph, Hint, ProtocolError, parse_event, to_wire
from tokencake_sim.workload.graph import chains

if TYPE_CHECKING:
    from tokencake_sim.workload.graph import NodePosition
    from tokencake_sim.workload.model import App, Node


def call_id(app: App, node: Node) -> str:
    """The id of the call that `node` makes, in the engine and in the hint."""
    return f"{app.id}/{node.id}"


def sessions_of(app: App) -> dict[str, str]:
    """The session of every node: calls that extend each other share one, each parallel branch has its own."""
    return {name: f"{app.id}/{head}" for name, head in chains(app.nodes).items()}


def tool_call_id(app: App, name: str) -> str:
    """The id of the tool call that follows the node `name`."""
    return f"{app.id}/{name}#tool"


def graph_id(app: App) -> str:
    """Hash of the topology: applications of one shape share it."""
    shape = "|".join(f"{node.id}<{','.join((*node.predecessors, *node.after))}" for node in app.nodes)
    return hashlib.sha256(f"{app.kind}|{shape}".encode()).hexdigest()[:16]


def make_hint(
    app: App, node: Node, session: str, place: NodePosition, max_depth: int, age_s: float, output_tokens: int | None
) -> Hint:
    """The hint of the call that `node` makes in `session`, `age_s` seconds after its application began.

    `output_tokens`: the length of the answer that the client expects; None where it does not say.
    """
    return Hint(
        session=session,
        call=call_id(app, node),
        app=app.id,
        app_started_ago_s=age_s,
        agent=node.agent,
        graph=graph_id(app),
        node=node.id,
        parent_call=None if node.parent is None else f"{app.id}/{node.parent}",
        parent_tool_call=None if node.parent is None else tool_call_id(app, node.parent),
        depth=place.depth,
        remaining=place.remaining,
        max_depth=max_depth,
        out_degree=place.out_degree,
        fan_out=place.fan_out,
        fan_index=place.fan_index,
        join=node.join,
        critical=place.is_critical,
        importance=node.importance,
        expects_tools=None if node.tool is None else {node.tool.name: node.tool.estimate_s},
        reuse="extends" if any(node.id in other.predecessors for other in app.nodes) else "final",
        expected_output_tokens=output_tokens,
    )


def make_graph(app: App) -> Graph | None:
    """The topology of `app`, sent once per shape; None where it is larger than the wire contract allows."""
    joins: dict[str, list[str]] = {}
    for node in app.nodes:
        if node.join is not None:
            joins.setdefault(node.join, []).append(node.id)
    graph = Graph(
        graph=graph_id(app),
        nodes={node.id: {"agent": node.agent} for node in app.nodes},
        edges=tuple((before, node.id) for node in app.nodes for before in (*node.predecessors, *node.after)),
        joins={name: tuple(members) for name, members in joins.items()} or None,
    )
    try:
        parse_event(json.loads(json.dumps(to_wire(graph))))
    except ProtocolError:
        return None
    return graph
