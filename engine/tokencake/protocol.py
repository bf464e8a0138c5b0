"""What do the client, the proxy and the engine say to each other?

One JSON contract, version 1: a *hint* rides on every LLM call, *events* travel between calls.
Everything that comes from outside is parsed here, once: known fields strictly, unknown fields are ignored, sizes are
bounded. A malformed hint is void (the call is not affected); a malformed event is `invalid` (the others in its body count).

```
ProtocolError           anything that does not follow the contract; carries `field`
```
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Final, Literal, TypeAlias, TypeVar

VERSION: Final = 1
HINT_KEY: Final = "tokencake"
"""The key inside the OpenAI body's `vllm_xargs` whose value is the hint, a JSON string."""

EVENTS_PATH: Final = "/v1/tokencake/events"
STATE_PATH: Final = "/v1/tokencake/state"

MAX_HINT_BYTES: Final = 16_384
MAX_BODY_BYTES: Final = 1_048_576
MAX_EVENTS: Final = 1_000
"""Events in one body. A client sends batches far smaller; a body beyond this is refused as a whole."""

MAX_ID_CHARS: Final = 256
MAX_SECONDS: Final = 30 * 86_400.0
MAX_AGO_S: Final = 3_600.0

Reuse: TypeAlias = Literal["extends", "final", "unknown"]
ToolStatus: TypeAlias = Literal["ok", "error", "cancelled"]
Outcome: TypeAlias = Literal["applied", "duplicate", "late", "unknown", "invalid"]
"""What became of an event. `late`: overtaken by a later one. `unknown`: its call or session is not known here."""


class ProtocolError(ValueError):
    """A hint or event does not follow the contract.

    Attributes:
        field: dotted name of the offending part, for example `hint.depth`.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where} {problem}")
        self.field = where


# --- parsers of single values -------------------------------------------------------------------

Parser: TypeAlias = Callable[[str, Any], Any]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong(where: str, value: object, expected: str) -> ProtocolError:
    return ProtocolError(where, f"is {_shown(value)}; expected {expected}")


def _is_unicode(text: str) -> bool:
    """JSON can spell lone surrogates, which no later encoder takes."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _text(limit: int = MAX_ID_CHARS) -> Parser:
    def parse(where: str, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= limit or not _is_unicode(value):
            raise _wrong(where, value, f"a string of 1 to {limit} characters")
        return value

    return parse


def _number(low: float, high: float) -> Parser:
    def parse(where: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _wrong(where, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return parse


def _count(high: int = 1_000_000) -> Parser:
    def parse(where: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
            raise _wrong(where, value, f"a whole number from 0 to {high}")
        return value

    return parse


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")
    return value


def _one_of(*choices: str) -> Parser:
    def parse(where: str, value: Any) -> str:
        if value not in choices:
            raise _wrong(where, value, "one of " + ", ".join(choices))
        return str(value)

    return parse


def _estimates(where: str, value: Any) -> dict[str, float | None]:
    """`{tool name: expected seconds, or null where nobody has said}`."""
    if not isinstance(value, dict) or len(value) > 128:
        raise _wrong(where, value, "an object of at most 128 tools")
    name, seconds = _text(), _number(0, MAX_SECONDS)
    return {
        name(f"{where} key", tool): None if number is None else seconds(f"{where}.{_shown(tool)}", number)
        for tool, number in value.items()
    }


def _list_of(item: Parser, limit: int) -> Parser:
    def parse(where: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise _wrong(where, value, f"a list of at most {limit} items")
        return tuple(item(f"{where}[{index}]", entry) for index, entry in enumerate(value))

    return parse


def _edge(where: str, value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise _wrong(where, value, "a pair [from, to]")
    name = _text()
    return name(f"{where}[0]", value[0]), name(f"{where}[1]", value[1])


def _object_of(item: Parser, limit: int) -> Parser:
    def parse(where: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > limit:
            raise _wrong(where, value, f"an object of at most {limit} entries")
        name = _text()
        return {name(f"{where} key", key): item(f"{where}.{_shown(key)}", entry) for key, entry in value.items()}

    return parse


def _opaque(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    return value


def _stage(where: str, value: Any) -> Stage:
    return _record(Stage, where, value)


_SECONDS: Final = _number(0, MAX_SECONDS)
_AGO: Final = _number(0, MAX_AGO_S)
_Record = TypeVar("_Record")


@cache
def _parsers(kind: type) -> tuple[tuple[str, Parser, bool], ...]:
    return tuple((f.name, f.metadata["parse"], bool(f.metadata["required"])) for f in fields(kind))


def _record(kind: type[_Record], where: str, raw: Any) -> _Record:
    if not isinstance(raw, dict):
        raise _wrong(where, raw, "an object")
    values: dict[str, Any] = {}
    for name, parse, required in _parsers(kind):
        value = raw.get(name)
        if value is not None:
            values[name] = parse(f"{where}.{name}", value)
        elif required:
            raise ProtocolError(f"{where}.{name}", "is missing")
    return kind(**values)


def _needs(parse: Parser) -> Any:
    return field(metadata={"parse": parse, "required": True})


def _may(parse: Parser, default: Any = None) -> Any:
    return field(default=default, metadata={"parse": parse, "required": False})


def to_wire(record: Hint | Event | Stage) -> dict[str, Any]:
    """`record` as the JSON object of the contract; fields that are None are left out."""
    wire: dict[str, Any] = {} if isinstance(record, Hint | Stage) else {"type": record.type}
    for name, _, _ in _parsers(type(record)):
        value = getattr(record, name)
        if value is not None:
            wire[name] = [to_wire(stage) for stage in value] if name == "stages" else value
    return wire


def _load(text: str | bytes, where: str) -> Any:
    def refuse(constant: str) -> float:
        raise ProtocolError(where, f"holds {constant}, which is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ProtocolError(where, "is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ProtocolError(where, f"is not UTF-8: {error}") from None
    except ProtocolError:
        raise
    except ValueError as error:
        raise ProtocolError(where, f"is not JSON: {error}") from None


def _check_version(where: str, raw: dict[str, Any]) -> None:
    version = raw.get("v", VERSION)
    if version != VERSION:
        raise _wrong(f"{where}.v", version, f"{VERSION}, the version spoken here")


# --- the hint -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hint:
    """Who makes an LLM call and what hangs on it. Only `session` is required; times are in seconds."""

    session: str = _needs(_text())
    """Whose KV this call extends: thread (or root run) and the agent's checkpoint namespace."""
    call: str | None = _may(_text())
    """Id of this call, the LangChain run id; the engine's request id where absent."""
    app: str | None = _may(_text())
    """The root run: all calls of one application instance."""
    app_started_ago_s: float | None = _may(_SECONDS)
    agent: str | None = _may(_text())
    graph: str | None = _may(_text())
    """Hash of the analysed topology."""
    node: str | None = _may(_text())
    parent_call: str | None = _may(_text())
    """A sub-agent works inside a tool call of this call."""
    parent_tool_call: str | None = _may(_text())
    depth: int | None = _may(_count())
    remaining: int | None = _may(_count())
    """LLM nodes on the longest path to the end, back edges removed."""
    max_depth: int | None = _may(_count())
    out_degree: int | None = _may(_count())
    fan_out: int | None = _may(_count())
    fan_index: int | None = _may(_count())
    join: str | None = _may(_text())
    """Id of the join that this branch feeds."""
    critical: bool | None = _may(_flag)
    importance: float | None = _may(_number(0, 10))
    expects_tools: dict[str, float | None] | None = _may(_estimates)
    """Tools that the model may call, with the expected seconds of each or None."""
    reuse: Reuse | None = _may(_one_of("extends", "final", "unknown"))
    expected_output_tokens: int | None = _may(_count())

    def to_json(self) -> str:
        """The value for `vllm_xargs["tokencake"]`."""
        return json.dumps({"v": VERSION, **to_wire(self)}, separators=(",", ":"))


def parse_hint(text: object) -> Hint:
    """Parse the value of `vllm_xargs["tokencake"]`.

    Raises:
        ProtocolError: it is not a JSON object in a string of at most `MAX_HINT_BYTES`, or a known field is malformed.
    """
    if not isinstance(text, str):
        raise _wrong("hint", text, "a JSON object written as a string")
    if len(text) > MAX_HINT_BYTES or len(text.encode(errors="replace")) > MAX_HINT_BYTES:
        raise ProtocolError("hint", f"has more than {MAX_HINT_BYTES} bytes")
    raw = _load(text, "hint")
    if not isinstance(raw, dict):
        raise _wrong("hint", raw, "an object")
    _check_version("hint", raw)
    return _record(Hint, "hint", raw)


# --- events -------------------------------------------------------------------------------------
# `ago_s` says how long ago an event happened when its body was sent: it needs no common clock, and takes the time
# that the event waited in a queue out of every measured duration.


@dataclass(frozen=True, slots=True)
class Stage:
    """One declared stage of a tool (paper 3.1, FuncNode)."""

    name: str = _needs(_text())
    estimate_s: float | None = _may(_SECONDS)


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool call began: the session of `call` is stalled in it."""

    type: ClassVar = "tool_start"
    call: str = _needs(_text())
    tool_call: str = _needs(_text())
    tool: str = _needs(_text())
    estimate_s: float | None = _may(_SECONDS)
    deadline_s: float | None = _may(_SECONDS)
    stages: tuple[Stage, ...] | None = _may(_list_of(_stage, 32))
    ago_s: float = _may(_AGO, 0.0)


@dataclass(frozen=True, slots=True)
class ToolProgress:
    """A running tool call reached `stage`, or `fraction` (0 to 1) of its work."""

    type: ClassVar = "tool_progress"
    call: str = _needs(_text())
    tool_call: str = _needs(_text())
    stage: str | None = _may(_text())
    fraction: float | None = _may(_number(0, 1))
    ago_s: float = _may(_AGO, 0.0)


@dataclass(frozen=True, slots=True)
class ToolEnd:
    """A tool call ended. `duration_s` is the client's own measurement and wins over the difference of the events."""

    type: ClassVar = "tool_end"
    call: str = _needs(_text())
    tool_call: str = _needs(_text())
    tool: str | None = _may(_text())
    status: ToolStatus = _may(_one_of("ok", "error", "cancelled"), "ok")
    duration_s: float | None = _may(_SECONDS)
    ago_s: float = _may(_AGO, 0.0)


@dataclass(frozen=True, slots=True)
class StallStart:
    """`session` waits for something that is no tool: a human, a join, plain code."""

    type: ClassVar = "stall_start"
    session: str = _needs(_text())
    kind: str = _needs(_text())
    estimate_s: float | None = _may(_SECONDS)
    ago_s: float = _may(_AGO, 0.0)


@dataclass(frozen=True, slots=True)
class StallEnd:
    """The wait of this `kind` is over."""

    type: ClassVar = "stall_end"
    session: str = _needs(_text())
    kind: str = _needs(_text())
    ago_s: float = _may(_AGO, 0.0)


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """No later call extends this session."""

    type: ClassVar = "session_end"
    session: str = _needs(_text())
    status: ToolStatus = _may(_one_of("ok", "error", "cancelled"), "ok")


@dataclass(frozen=True, slots=True)
class AppEnd:
    """The application instance is over, and with it all its sessions."""

    type: ClassVar = "app_end"
    app: str = _needs(_text())
    status: ToolStatus = _may(_one_of("ok", "error", "cancelled"), "ok")


@dataclass(frozen=True, slots=True)
class Graph:
    """Topology of a graph, once per graph and engine. `nodes` maps each name to what is known of it."""

    type: ClassVar = "graph"
    graph: str = _needs(_text())
    nodes: dict[str, dict[str, Any]] = _needs(_object_of(_opaque, 1_000))
    edges: tuple[tuple[str, str], ...] = _needs(_list_of(_edge, 10_000))
    joins: dict[str, tuple[str, ...]] | None = _may(_object_of(_list_of(_text(), 1_000), 1_000))


Event: TypeAlias = ToolStart | ToolProgress | ToolEnd | StallStart | StallEnd | SessionEnd | AppEnd | Graph

_EVENTS: Final[dict[str, type[Event]]] = {
    kind.type: kind for kind in (ToolStart, ToolProgress, ToolEnd, StallStart, StallEnd, SessionEnd, AppEnd, Graph)
}


def parse_event(raw: Any, where: str = "event") -> Event:
    """Parse one event object.

    Raises:
        ProtocolError: the type is not known or a known field is malformed.
    """
    if not isinstance(raw, dict):
        raise _wrong(where, raw, "an object")
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in _EVENTS:
        raise _wrong(f"{where}.type", kind, "one of " + ", ".join(_EVENTS))
    return _record(_EVENTS[kind], where, raw)


def parse_events(body: bytes) -> list[Event | ProtocolError]:
    """Parse the body of `POST /v1/tokencake/events`, one entry per event and in its order.

    Raises:
        ProtocolError: the body as a whole is unusable: not JSON, not `{"v": 1, "events": [...]}`, or over
            `MAX_BODY_BYTES` or `MAX_EVENTS`.
    """
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError("body", f"has {len(body)} bytes; at most {MAX_BODY_BYTES} are taken, send smaller batches")
    raw = _load(body, "body")
    if not isinstance(raw, dict):
        raise _wrong("body", raw, 'an object {"v": 1, "events": [...]}')
    _check_version("body", raw)
    events = raw.get("events")
    if not isinstance(events, list):
        raise _wrong("body.events", events, "a list of events")
    if len(events) > MAX_EVENTS:
        raise ProtocolError("body.events", f"has {len(events)} events; at most {MAX_EVENTS} are taken, send batches")
    parsed: list[Event | ProtocolError] = []
    for index, event in enumerate(events):
        try:
            parsed.append(parse_event(event, f"events[{index}]"))
        except ProtocolError as error:
            parsed.append(error)
    return parsed


