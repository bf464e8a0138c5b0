"""Agent and session of a run: which agent makes the call, and whose KV it extends.

LangGraph describes the location of every run in its metadata: the node, the checkpoint namespace
(`outer:uuid|inner:uuid`; the last segment is the node's own task, whose uuid changes with every step) and the path
(pulled by an edge, or pushed by `Send`). This module has pure functions of that metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final
from urllib.parse import quote

from tokencake.protocol import MAX_ID_CHARS

LOOP_NODES: Final = frozenset({"model", "agent", "tools", "call_model"})
"""Node names in the loop of prebuilt agents: they name a role, not an agent."""

UNNAMED_AGENT: Final = "default"
_DIGEST_CHARS: Final = 32
_HEADER_SAFE: Final = "/|:!$&'()*+,;=@~.-_[]#?"


@dataclass(frozen=True, slots=True)
class RunLocation:
    """Where a run executes. `namespace` is that of the enclosing graph, without the node's own task."""

    session: str
    agent: str
    node: str | None
    namespace: str


def wire_text(value: object) -> str:
    """`value` as a name or id of the wire contract: valid Unicode, at most `MAX_ID_CHARS`, with a long tail hashed."""
    text = value if isinstance(value, str) else str(value)
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    if len(text) > MAX_ID_CHARS:
        digest = blake2b(text.encode(), digest_size=_DIGEST_CHARS // 2).hexdigest()
        text = f"{text[: MAX_ID_CHARS - _DIGEST_CHARS - 1]}~{digest}"
    return text


def session_id(owner: object, namespace: str, agent: str) -> str:
    """The session id, valid in an HTTP header. `owner` is the thread, or the root run if there is none."""
    text = f"{owner}/{namespace}/{agent}"
    if not (text.isascii() and text.isprintable()) or " " in text:
        text = quote(text, safe=_HEADER_SAFE, errors="replace")
    return wire_text(text)


def task_namespace(metadata: Mapping[str, Any]) -> str:
    """The checkpoint namespace with the node's own task; empty outside LangGraph."""
    return str(metadata.get("langgraph_checkpoint_ns") or "")


def graph_namespace(task: str) -> str:
    """The namespace of the graph that contains the task with this namespace."""
    return task.rpartition("|")[0]


def send_index(metadata: Mapping[str, Any]) -> int | None:
    """RunLocation among the tasks of one `Send` fan-out; None for a node that an edge pulled.

    The tasks of the functional API are pushed too, but by their parent's code (`path[1]` is then the parent's path):
    a loop that calls one task repeatedly is one agent, not a fan-out.
    """
    match metadata.get("langgraph_path"):
        case ["__pregel_push", int(index), *_]:
            return index
        case _:
            return None


def agent_name(metadata: Mapping[str, Any], graph: str | None) -> str:
    """`create_agent`'s own name, else the innermost node that is not in `LOOP_NODES`, else the graph's name."""
    if name := metadata.get("lc_agent_name"):
        return wire_text(name)
    for segment in reversed(task_namespace(metadata).split("|")):
        node = segment.split(":", 1)[0]
        # A number counts the subgraphs that one task has called.
        if node and not node.isdigit() and node not in LOOP_NODES:
            return wire_text(node)
    return wire_text(graph or UNNAMED_AGENT)


def locate(metadata: Mapping[str, Any], app: str, graph: str | None) -> RunLocation:
    """The location of the run with this metadata in application `app`, whose root graph is named `graph`."""
    agent = agent_name(metadata, graph)
    task = task_namespace(metadata)
    namespace = graph_namespace(task)
    own = namespace if send_index(metadata) is None else task
    node = metadata.get("langgraph_node")
    return RunLocation(
        session=session_id(metadata.get("thread_id") or app, own, agent),
        agent=agent,
        node=wire_text(node) if node else None,
        namespace=namespace,
    )
