"""Loading a workload from JSON; an error names file, node and reason.

The rules are those of `benchmarks/workloads/schema.json`, and that the graph can run.

`iterations: n` of a node is unrolled here: `name@1` ... `name@n-1`, then `name`, each building on the one before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from tokencake_sim.errors import WorkloadError
from tokencake_sim.workload.fields import Fields
from tokencake_sim.workload.graph import CycleError, topological, waits_for
from tokencake_sim.workload.model import App, Node, Prefix, Tool, Workload

if TYPE_CHECKING:
    from pathlib import Path

VERSION: Final = 1
_MAX_SECONDS: Final = 30 * 86_400.0


def load_workload(path: Path) -> Workload:
    """Read a workload file.

    Raises:
        WorkloadError: the file cannot be read, is no JSON, breaks the schema or cannot be run.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkloadError(str(path), "the file", f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WorkloadError(str(path), "the file", f"is not JSON: {error}") from None
    return parse_workload(raw, str(path))


def parse_workload(raw: Any, source: str) -> Workload:
    """Check `raw`, the JSON value of a workload.

    Raises:
        WorkloadError: it breaks the schema or cannot be run.
    """
    fields = Fields(source, "the file", raw)
    if (version := fields.take("version")) != VERSION:
        raise fields.wrong("version", version, f"{VERSION}, the version spoken here")
    name = fields.text("name")
    apps = tuple(_app(source, index, entry) for index, entry in enumerate(fields.items("apps")))
    fields.end()
    ids = [app.id for app in apps]
    if repeated := sorted({name for name in ids if ids.count(name) > 1}):
        raise WorkloadError(source, f"application {repeated[0]}", "is defined twice")
    return Workload(name, tuple(sorted(apps, key=lambda app: app.arrival_s)), source)


def _app(source: str, index: int, raw: Any) -> App:
    fields = Fields(source, f"apps[{index}]", raw)
    name = fields.text("id", f"app-{index}")
    kind = fields.text("kind", "app")
    arrival_s = fields.number("arrival_s", _MAX_SECONDS, 0.0)
    is_agentic = fields.flag("agentic", True) is not False
    raw_nodes = fields.items("nodes")
    fields.end()
    nodes = [
        part
        for position, entry in enumerate(raw_nodes)
        for part in _nodes(source, f"application {name}", position, entry)
    ]
    check_nodes(source, name, nodes)
    return App(name, kind, arrival_s, tuple(nodes), is_agentic)


def _nodes(source: str, app: str, position: int, raw: Any) -> list[Node]:
    fields = Fields(source, f"{app}, node {position}", raw)
    name = fields.text("id")
    fields.where = f"{app}, node {name}"
    tool, prefix = fields.take("tool", None), fields.take("prefix", None)
    iterations = fields.count("iterations", 1, low=1)
    node = Node(
        id=name,
        agent=fields.text("agent", name),
        new_tokens=fields.count("new_tokens", 0),
        output_tokens=fields.count("output_tokens", 0),
        predecessors=tuple(map(str, fields.items("predecessors", []))),
        after=tuple(map(str, fields.items("after", []))),
        prefix=None if prefix is None else _prefix(Fields(source, f"{fields.where}, prefix", prefix)),
        tool=None if tool is None else _tool(Fields(source, f"{fields.where}, tool", tool)),
        parent=fields.text("parent", None),
        join=fields.text("join", None),
        critical=fields.flag("critical", None),
        importance=fields.number("importance", 10.0, None),
        keeps_answer=fields.flag("keeps_answer", True) is not False,
    )
    fields.end()
    if iterations == 1:
        return [node]
    names = [f"{name}@{turn}" for turn in range(1, iterations)] + [name]
    turns = [replace(node, id=names[0])]
    turns += [
        replace(node, id=later, predecessors=(earlier,), after=(), prefix=None) for earlier, later in pairwise(names)
    ]
    return turns


def _prefix(fields: Fields) -> Prefix:
    prefix = Prefix(fields.text("key"), fields.count("tokens", low=1))
    fields.end()
    return prefix


def _tool(fields: Fields) -> Tool:
    tool = Tool(
        name=fields.text("name"),
        duration_s=fields.number("duration_s", _MAX_SECONDS),
        result_tokens=fields.count("result_tokens", 0),
        estimate_s=fields.number("estimate_s", _MAX_SECONDS, None),
    )
    fields.end()
    return tool


def check_nodes(source: str, app: str, nodes: list[Node]) -> None:
    """Check the structure of one application.

    Raises:
        WorkloadError: a name is used twice, is missing, or the nodes wait for each other.
    """
    known: dict[str, Node] = {}
    for node in nodes:
        if node.id in known:
            raise WorkloadError(source, f"application {app}, node {node.id}", "is defined twice")
        known[node.id] = node
    if not nodes:
        raise WorkloadError(source, f"application {app}", "has no nodes")
    for node in nodes:
        where = f"application {app}, node {node.id}"
        if missing := [name for name in (*node.predecessors, *node.after) if name not in known]:
            raise WorkloadError(source, where, f"follows {missing[0]}, which is not a node of this application")
        if node.parent is not None and (node.parent not in known or known[node.parent].tool is None):
            raise WorkloadError(source, where, f"works inside {node.parent}, which is not a node with a tool")
        if node.is_local and node.tool is None and node.new_tokens:
            raise WorkloadError(source, where, "has new_tokens but no output_tokens; a call answers with at least one")
    try:
        topological(waits_for(tuple(nodes)))
    except CycleError as error:
        raise WorkloadError(source, f"application {app}, node {error.nodes[0]}", str(error)) from None
    except RecursionError:
        raise WorkloadError(source, f"application {app}", "nests its sub-agents in a circle") from None


def to_json(workload: Workload) -> dict[str, Any]:
    """`workload` as the JSON value that `parse_workload` reads."""
    return {
        "version": VERSION,
        "name": workload.name,
        "apps": [
            {
                "id": app.id,
                "kind": app.kind,
                "arrival_s": app.arrival_s,
                "agentic": app.is_agentic,
                "nodes": [_plain(node) for node in app.nodes],
            }
            for app in workload.apps
        ],
    }


def _plain(record: Node | Tool | Prefix) -> Mapping[str, Any]:
    values = {field.name: getattr(record, field.name) for field in fields_of(record)}
    unsaid = {field.name: field.default for field in fields_of(record)}
    return {
        name: _plain(value) if isinstance(value, Tool | Prefix) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != unsaid[name]
    }
