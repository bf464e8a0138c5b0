"""Parsers for values from outside: messages and settings.

A parser takes the dotted name of a value and the value. It returns the typed value or raises `ProtocolError`. A record
is a dataclass whose fields each carry their parser.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import field, fields, replace
from typing import Any, Final, TypeAlias, TypeVar

MAX_ID_CHARS: Final = 256
MAX_TOOLS: Final = 128
MAX_SECONDS: Final = 30 * 86_400.0
MAX_AGO_S: Final = 3_600.0


class ProtocolError(ValueError):
    """A hint or event does not follow the contract.

    Attributes:
        field: dotted name of the offending part, for example `hint.depth`.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where} {problem}")
        self.field = where


class TooLargeError(ProtocolError):
    """A message is longer than the contract allows."""


class UnmarkedError(ProtocolError):
    """A message lacks the proof of its tenant, although tenants are isolated."""


Parser: TypeAlias = Callable[[str, Any], Any]


def short_repr(value: object) -> str:
    """`value` for an error message: short, however large or deep it is."""
    return reprlib.repr(value)


def invalid(where: str, value: object, expected: str) -> ProtocolError:
    """The error that names the field, its value and what was expected."""
    return ProtocolError(where, f"is {short_repr(value)}; expected {expected}")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode `text`: JSON can express lone surrogates."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def text(limit: int = MAX_ID_CHARS) -> Parser:
    """A string of 1 to `limit` characters that UTF-8 can encode."""

    def parse(where: str, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= limit or not _is_unicode(value):
            raise invalid(where, value, f"a string of 1 to {limit} characters")
        return value

    return parse


def number(low: float, high: float) -> Parser:
    """A number within the bounds, both included."""

    def parse(where: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise invalid(where, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return parse


def count(high: int = 1_000_000) -> Parser:
    """A whole number from 0 to `high`."""

    def parse(where: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
            raise invalid(where, value, f"a whole number from 0 to {high}")
        return value

    return parse


def flag(where: str, value: Any) -> bool:
    """True or false, not 0 or 1."""
    if not isinstance(value, bool):
        raise invalid(where, value, "true or false")
    return value


def one_of(*choices: str) -> Parser:
    """One of the strings `choices`."""

    def parse(where: str, value: Any) -> str:
        if value not in choices:
            raise invalid(where, value, "one of " + ", ".join(choices))
        return str(value)

    return parse


def estimates(where: str, value: Any) -> dict[str, float | None]:
    """`{tool name: expected seconds, or null}`."""
    if not isinstance(value, dict) or len(value) > MAX_TOOLS:
        raise invalid(where, value, f"an object of at most {MAX_TOOLS} tools")
    name, seconds = text(), number(0, MAX_SECONDS)
    return {
        name(f"{where} key", tool): None if number is None else seconds(f"{where}.{short_repr(tool)}", number)
        for tool, number in value.items()
    }


def list_of(item: Parser, limit: int) -> Parser:
    """A list of at most `limit` items, as a tuple."""

    def parse(where: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise invalid(where, value, f"a list of at most {limit} items")
        return tuple(item(f"{where}[{index}]", entry) for index, entry in enumerate(value))

    return parse


def edge(where: str, value: Any) -> tuple[str, str]:
    """A pair of node names."""
    if not isinstance(value, list) or len(value) != 2:  # noqa: PLR2004  # a pair
        raise invalid(where, value, "a pair [from, to]")
    name = text()
    return name(f"{where}[0]", value[0]), name(f"{where}[1]", value[1])


def object_of(item: Parser, limit: int) -> Parser:
    """An object of at most `limit` entries."""

    def parse(where: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > limit:
            raise invalid(where, value, f"an object of at most {limit} entries")
        name = text()
        return {name(f"{where} key", key): item(f"{where}.{short_repr(key)}", entry) for key, entry in value.items()}

    return parse


def scalar(where: str, value: Any) -> str | float | bool:
    """A string, a number or a boolean."""
    if isinstance(value, bool):
        return value
    parsed: str | float = (text() if isinstance(value, str) else number(-1e15, 1e15))(where, value)
    return parsed


SECONDS: Final = number(0, MAX_SECONDS)
AGO: Final = number(0, MAX_AGO_S)
_Record = TypeVar("_Record")
_known: dict[Any, tuple[tuple[str, Parser, bool], ...]] = {}


def parsers(kind: Any) -> tuple[tuple[str, Parser, bool], ...]:
    """`(name, parser, is required)` of each field of a record type that is on the wire."""
    if kind not in _known:
        _known[kind] = tuple(
            (f.name, f.metadata["parse"], bool(f.metadata["required"])) for f in fields(kind) if "parse" in f.metadata
        )
    return _known[kind]


def scoped_fields(kind: Any) -> tuple[str, ...]:
    """The fields of a record type that hold ids, or have ids as keys: the proxy scopes them by tenant."""
    return tuple(f.name for f in fields(kind) if f.metadata.get("scoped"))


def parse_record(kind: type[_Record], where: str, raw: Any) -> _Record:
    """An instance of the dataclass `kind` from the JSON object `raw`. Null is the same as absent."""
    if not isinstance(raw, dict):
        raise invalid(where, raw, "an object")
    values: dict[str, Any] = {}
    for name, parse, is_required in parsers(kind):
        value = raw.get(name)
        if value is not None:
            values[name] = parse(f"{where}.{name}", value)
        elif is_required:
            raise ProtocolError(f"{where}.{name}", "is missing")
    return kind(**values)


def required(parse: Parser, *, scoped: bool = False) -> Any:
    """A required field. `scoped`: it is an id by which the engine looks something up, so the proxy scopes it."""
    return field(metadata={"parse": parse, "required": True, "scoped": scoped})


def optional(parse: Parser, default: Any = None, *, scoped: bool = False) -> Any:
    """An optional field. `scoped`: it is an id by which the engine looks something up, or has ids as keys."""
    return field(default=default, metadata={"parse": parse, "required": False, "scoped": scoped})


def scoped(record: _Record, tenant: str) -> _Record:
    """`record` with the prefix `tenant` before its ids; unchanged if `tenant` is empty."""
    if not tenant:
        return record
    changes: dict[str, Any] = {"tenant": tenant} if hasattr(record, "tenant") else {}
    for name in scoped_fields(type(record)):
        value = getattr(record, name)
        if isinstance(value, dict):
            changes[name] = {tenant + key: entry for key, entry in value.items()}
        elif value is not None:
            changes[name] = tenant + value
    return replace(record, **changes)  # type: ignore[type-var]  # every record is a dataclass


def unscoped(raw: Any, tenant: str, names: Iterable[str], where: str) -> Any:
    """The JSON object `raw` without the prefix `tenant` before the ids in its fields `names`.

    Limits apply to what the client sent, so this precedes the parsing.

    Raises:
        UnmarkedError: an id lacks the prefix.
    """
    if not tenant or not isinstance(raw, dict):
        return raw

    def own(name: str, text: str) -> str:
        if text and not text.startswith(tenant):
            raise UnmarkedError(f"{where}.{name}", "is not scoped by the proxy")
        return text.removeprefix(tenant)

    found = dict(raw)
    for name in names:
        match raw.get(name):
            case str() as text:
                found[name] = own(name, text)
            case dict() as keyed:
                found[name] = {own(name, key): entry for key, entry in keyed.items()}
    return found


def parse_json(text: str | bytes, where: str) -> Any:
    """`text` as JSON. NaN and Infinity, which Python accepts, are refused."""

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
