"""The messages of the wire contract between client, proxy and engine, version 1.

Every LLM call carries a *hint*; *events* are sent between calls. Both are JSON. This module parses all input from
outside, once: known fields strictly, unknown fields are ignored, sizes are bounded. A malformed hint is void and does
not affect its call. A malformed event is `invalid` and does not affect the other events of its body.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias

from tokencake.protocol import parsing
from tokencake.protocol.parsing import MAX_AGO_S, MAX_ID_CHARS, ProtocolError, TooLargeError, UnmarkedError, scoped
from tokencake.protocol.tenancy import Tenants

__all__ = [
    "DECISIONS_PATH",
    "EVENTS_PATH",
    "HINT_KEY",
    "MARK_KEY",
    "MAX_AGO_S",
    "MAX_BODY_BYTES",
    "MAX_EVENTS",
    "MAX_HINT_BYTES",
    "MAX_ID_CHARS",
    "SCOPED_BODY_BYTES",
    "SCOPED_FIELDS",
    "STATE_PATH",
    "VERSION",
    "AppEnd",
    "Event",
    "EventOutcome",
    "Graph",
    "Hint",
    "ProtocolError",
    "Reuse",
    "SessionEnd",
    "Stage",
    "StallEnd",
    "StallStart",
    "TooLargeError",
    "ToolEnd",
    "ToolProgress",
    "ToolStart",
    "ToolStatus",
    "UnmarkedError",
    "check_body_size",
    "parse_event",
    "parse_events",
    "parse_hint",
    "scoped",
    "to_wire",
]

VERSION: Final = 1
HINT_KEY: Final = "tokencake"
"""The key inside the OpenAI body's `vllm_xargs` whose value is the hint, a JSON string."""
MARK_KEY: Final = "mark"
"""The field of a hint with which a proxy that isolates tenants proves that it has scoped the hint's ids."""

EVENTS_PATH: Final = "/v1/tokencake/events"
STATE_PATH: Final = "/v1/tokencake/state"
DECISIONS_PATH: Final = "/v1/tokencake/decisions"

MAX_HINT_BYTES: Final = 16_384
MAX_BODY_BYTES: Final = 262_144
MAX_EVENTS: Final = 1_000
"""Events in one body. Clients send much smaller batches; a larger body is refused completely."""
SCOPED_HINT_BYTES: Final = MAX_HINT_BYTES + 1_024
SCOPED_BODY_BYTES: Final = 4 * MAX_BODY_BYTES
"""The limits with a tenant's prefix before every id. The proxy applies the limits above to what the client sent."""


Reuse: TypeAlias = Literal["extends", "final", "unknown"]
ToolStatus: TypeAlias = Literal["ok", "error", "cancelled"]
EventOutcome: TypeAlias = Literal["applied", "duplicate", "late", "unknown", "invalid"]
"""The effect of an event. `late`: a later event came first. `unknown`: the engine does not know its call or session."""


def to_wire(record: Hint | Event | Stage) -> dict[str, Any]:
    """`record` as the JSON object of the contract; fields that are None are left out."""
    wire: dict[str, Any] = {} if isinstance(record, Hint | Stage) else {"type": record.type}
    for name, _, _ in parsing.parsers(type(record)):
        value = getattr(record, name)
        if value is not None:
            wire[name] = [to_wire(stage) for stage in value] if name == "stages" else value
    return wire


_encode: Final = json.JSONEncoder(separators=(",", ":")).encode  # created once: `dumps` would create one for each hint


def _check_version(where: str, raw: dict[str, Any]) -> None:
    version = raw.get("v", VERSION)
    if version != VERSION:
        raise parsing.invalid(f"{where}.v", version, f"{VERSION}, the supported version")


# --- the hint -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hint:
    """The agent that makes an LLM call, and its place in the application. Only `session` is required."""

    session: str = parsing.required(parsing.text(), scoped=True)
    """The prefix that this call extends: thread (or root run) and the agent's checkpoint namespace."""
    call: str | None = parsing.optional(parsing.text(), scoped=True)
    """Id of this call, the LangChain run id. If absent, the engine's request id is used."""
    app: str | None = parsing.optional(parsing.text(), scoped=True)
    """The root run, shared by all calls of one application instance."""
    app_started_ago_s: float | None = parsing.optional(parsing.SECONDS)
    agent: str | None = parsing.optional(parsing.text())
    graph: str | None = parsing.optional(parsing.text(), scoped=True)
    """Hash of the analysed topology."""
    node: str | None = parsing.optional(parsing.text())
    parent_call: str | None = parsing.optional(parsing.text(), scoped=True)
    """The call that waits for this one in a tool call, if this is the call of a sub-agent."""
    parent_tool_call: str | None = parsing.optional(parsing.text())
    depth: int | None = parsing.optional(parsing.count())
    remaining: int | None = parsing.optional(parsing.count())
    """LLM nodes on the longest path to the end, without back edges."""
    max_depth: int | None = parsing.optional(parsing.count())
    out_degree: int | None = parsing.optional(parsing.count())
    fan_out: int | None = parsing.optional(parsing.count())
    fan_index: int | None = parsing.optional(parsing.count())
    join: str | None = parsing.optional(parsing.text(), scoped=True)
    """Id of the join that waits for this branch."""
    critical: bool | None = parsing.optional(parsing.flag)
    importance: float | None = parsing.optional(parsing.number(0, 10))
    expects_tools: dict[str, float | None] | None = parsing.optional(parsing.estimates)
    """Tool that the model may call -> expected seconds, or None."""
    reuse: Reuse | None = parsing.optional(parsing.one_of("extends", "final", "unknown"))
    expected_output_tokens: int | None = parsing.optional(parsing.count())
    tenant: str = ""
    """Prefix of the ids, from their mark; empty if tenants are not isolated. Not on the wire."""

    def to_json(self) -> str:
        """The value for `vllm_xargs["tokencake"]`."""
        return _encode({"v": VERSION, **to_wire(self)})


def parse_hint(text: object, tenants: Tenants | None = None) -> Hint:
    """Parse the value of `vllm_xargs["tokencake"]`.

    Args:
        text: the value.
        tenants: verifies marks, if tenants are isolated: then only a hint with a valid mark is parsed.

    Raises:
        UnmarkedError: `tenants` is given and the hint has no valid mark.
        ProtocolError: it is not a JSON object in a string of at most `MAX_HINT_BYTES`, or a known field is malformed.
    """
    if not isinstance(text, str):
        raise parsing.invalid("hint", text, "a JSON object written as a string")
    limit = MAX_HINT_BYTES if tenants is None else SCOPED_HINT_BYTES
    if len(text) > limit or len(text.encode(errors="replace")) > limit:
        raise TooLargeError("hint", f"has more than {MAX_HINT_BYTES} bytes")
    raw = parsing.parse_json(text, "hint")
    if not isinstance(raw, dict):
        raise parsing.invalid("hint", raw, "an object")
    _check_version("hint", raw)
    if tenants is None:
        return parsing.parse_record(Hint, "hint", raw)
    tenant = tenants.prefix_from_mark(raw.get(MARK_KEY))
    if tenant is None:
        raise UnmarkedError(f"hint.{MARK_KEY}", "is not that of a proxy with this engine's tenant secret")
    return scoped(parsing.parse_record(Hint, "hint", parsing.unscoped(raw, tenant, SCOPED_FIELDS, "hint")), tenant)


# --- events -------------------------------------------------------------------------------------
# `ago_s` is the age of an event when its body was sent. It needs no common clock, and it removes the time that an event
# waited in a queue from every measured duration.


@dataclass(frozen=True, slots=True)
class Stage:
    """One declared stage of a tool (paper 3.1, FuncNode)."""

    name: str = parsing.required(parsing.text())
    estimate_s: float | None = parsing.optional(parsing.SECONDS)


def _stage(where: str, value: Any) -> Stage:
    return parsing.parse_record(Stage, where, value)


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool call started; the session of `call` stalls in it."""

    type: ClassVar = "tool_start"
    call: str = parsing.required(parsing.text(), scoped=True)
    tool_call: str = parsing.required(parsing.text())
    tool: str = parsing.required(parsing.text())
    estimate_s: float | None = parsing.optional(parsing.SECONDS)
    deadline_s: float | None = parsing.optional(parsing.SECONDS)
    stages: tuple[Stage, ...] | None = parsing.optional(parsing.list_of(_stage, 32))
    ago_s: float = parsing.optional(parsing.AGO, 0.0)


@dataclass(frozen=True, slots=True)
class ToolProgress:
    """A running tool call reached `stage`, or `fraction` (0 to 1) of its work."""

    type: ClassVar = "tool_progress"
    call: str = parsing.required(parsing.text(), scoped=True)
    tool_call: str = parsing.required(parsing.text())
    stage: str | None = parsing.optional(parsing.text())
    fraction: float | None = parsing.optional(parsing.number(0, 1))
    ago_s: float = parsing.optional(parsing.AGO, 0.0)


@dataclass(frozen=True, slots=True)
class ToolEnd:
    """A tool call ended. `duration_s`, measured by the client, overrides the time between the events."""

    type: ClassVar = "tool_end"
    call: str = parsing.required(parsing.text(), scoped=True)
    tool_call: str = parsing.required(parsing.text())
    tool: str | None = parsing.optional(parsing.text())
    status: ToolStatus = parsing.optional(parsing.one_of("ok", "error", "cancelled"), "ok")
    duration_s: float | None = parsing.optional(parsing.SECONDS)
    ago_s: float = parsing.optional(parsing.AGO, 0.0)


@dataclass(frozen=True, slots=True)
class StallStart:
    """`session` stalls in something other than a tool: a human, a join, plain code."""

    type: ClassVar = "stall_start"
    session: str = parsing.required(parsing.text(), scoped=True)
    kind: str = parsing.required(parsing.text())
    estimate_s: float | None = parsing.optional(parsing.SECONDS)
    ago_s: float = parsing.optional(parsing.AGO, 0.0)


@dataclass(frozen=True, slots=True)
class StallEnd:
    """The stall of this `kind` has ended."""

    type: ClassVar = "stall_end"
    session: str = parsing.required(parsing.text(), scoped=True)
    kind: str = parsing.required(parsing.text())
    ago_s: float = parsing.optional(parsing.AGO, 0.0)


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """No later call extends this session."""

    type: ClassVar = "session_end"
    session: str = parsing.required(parsing.text(), scoped=True)
    status: ToolStatus = parsing.optional(parsing.one_of("ok", "error", "cancelled"), "ok")


@dataclass(frozen=True, slots=True)
class AppEnd:
    """The application instance has ended, and with it the sessions whose ids begin with its own id.

    Other sessions may continue in another instance, for example those of a thread in its next turn.
    """

    type: ClassVar = "app_end"
    app: str = parsing.required(parsing.text(), scoped=True)
    status: ToolStatus = parsing.optional(parsing.one_of("ok", "error", "cancelled"), "ok")


@dataclass(frozen=True, slots=True)
class Graph:
    """The topology of a graph, sent once per graph and engine. `nodes`: name -> attributes, as plain values."""

    type: ClassVar = "graph"
    graph: str = parsing.required(parsing.text(), scoped=True)
    nodes: dict[str, dict[str, Any]] = parsing.required(parsing.object_of(parsing.object_of(parsing.scalar, 16), 256))
    edges: tuple[tuple[str, str], ...] = parsing.required(parsing.list_of(parsing.edge, 2_000))
    joins: dict[str, tuple[str, ...]] | None = parsing.optional(
        parsing.object_of(parsing.list_of(parsing.text(), 256), 256), scoped=True
    )
    """Id of a join -> the nodes that it waits for."""
    tenant: str = ""
    """As in `Hint`."""


Event: TypeAlias = ToolStart | ToolProgress | ToolEnd | StallStart | StallEnd | SessionEnd | AppEnd | Graph

_EVENTS: Final[dict[str, type[Event]]] = {
    kind.type: kind for kind in (ToolStart, ToolProgress, ToolEnd, StallStart, StallEnd, SessionEnd, AppEnd, Graph)
}
SCOPED_FIELDS: Final = frozenset(
    name
    for kind in (Hint, *_EVENTS.values())
    for name in parsing.scoped_fields(kind)  # from the fields' own definitions
)
"""The fields of hints and events that hold ids, or are keyed by ids."""


def parse_event(raw: Any, where: str = "event") -> Event:
    """Parse one event object.

    Raises:
        ProtocolError: the type is unknown, or a known field is malformed.
    """
    if not isinstance(raw, dict):
        raise parsing.invalid(where, raw, "an object")
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in _EVENTS:
        raise parsing.invalid(f"{where}.type", kind, "one of " + ", ".join(_EVENTS))
    return parsing.parse_record(_EVENTS[kind], where, raw)


def check_body_size(size_bytes: int, *, is_scoped: bool = False) -> None:
    """Raise TooLargeError if a body of events is too long. `is_scoped`: its ids have prefixes."""
    if size_bytes > (SCOPED_BODY_BYTES if is_scoped else MAX_BODY_BYTES):
        raise TooLargeError("body", f"has {size_bytes} bytes; at most {MAX_BODY_BYTES} are taken, send smaller batches")


def parse_events(body: bytes, tenant: str = "") -> list[Event | ProtocolError]:
    """Parse the body of `POST /v1/tokencake/events`. The result has one entry per event, in the body's order.

    Args:
        body: the bytes as received.
        tenant: the prefix of every id in it, which is removed; see `scoped`.

    Raises:
        ProtocolError: the whole body is unusable: not JSON, not `{"v": 1, "events": [...]}`, or over
            `MAX_BODY_BYTES` or `MAX_EVENTS`.
    """
    check_body_size(len(body), is_scoped=bool(tenant))
    raw = parsing.parse_json(body, "body")
    if not isinstance(raw, dict):
        raise parsing.invalid("body", raw, 'an object {"v": 1, "events": [...]}')
    _check_version("body", raw)
    events = raw.get("events")
    if not isinstance(events, list):
        raise parsing.invalid("body.events", events, "a list of events")
    if len(events) > MAX_EVENTS:
        raise TooLargeError("body.events", f"has {len(events)} events; at most {MAX_EVENTS} are taken, send batches")
    parsed: list[Event | ProtocolError] = []
    for index, event in enumerate(events):
        try:
            where = f"events[{index}]"
            parsed.append(parse_event(parsing.unscoped(event, tenant, SCOPED_FIELDS, where), where))
        except ProtocolError as error:
            parsed.append(error)
    return parsed
