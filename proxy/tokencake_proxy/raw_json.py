"""JSON objects split into members that keep their original bytes.

Scanning a body of 64 MiB takes a tenth of a second, and changing one member leaves the others as they were. A rebuilt
object has each name once, so that no second parser can read it differently.
"""

from __future__ import annotations

import json
from typing import Any, Final, TypeAlias

import msgspec

RawJson: TypeAlias = msgspec.Raw
RawMembers: TypeAlias = dict[str, msgspec.Raw]

_LENIENT_BYTES: Final = 2**20
"""Up to this size, JSON that Python accepts and msgspec does not is read too: other encodings, lone surrogates."""

_MEMBERS: Final = msgspec.json.Decoder(RawMembers)
_ELEMENTS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_ANYTHING: Final = msgspec.json.Decoder(msgspec.Raw)
_TEXT: Final = msgspec.json.Decoder(str)


def parse_members(whole: bytes | RawJson) -> RawMembers | None:
    """The members of the JSON object `whole`, the last one of each name; None if it is JSON but not an object.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    try:
        return _MEMBERS.decode(whole)
    except msgspec.ValidationError:
        read = _ANYTHING.decode(whole)  # raises for deep nesting, and for what is not JSON
    except (msgspec.DecodeError, UnicodeDecodeError):
        read = _read_leniently(bytes(whole))
    if not isinstance(read, dict):
        return None
    for name in read:
        name.encode()  # raises for a lone surrogate, which UTF-8 cannot encode
    return {name: _escaped(value) for name, value in read.items()}


def object_or_none(member: RawJson | None) -> RawMembers | None:
    """The members of an object; None if it is not one."""
    try:
        return None if member is None else parse_members(member)
    except ValueError:
        return None


def array_or_none(member: RawJson | None) -> list[RawJson] | None:
    """The elements of an array; None if it is not one."""
    try:
        return None if member is None else _ELEMENTS.decode(member)
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError):
        read = _read_leniently(bytes(member or b""))
    return [_escaped(value) for value in read] if isinstance(read, list) else None


def is_null(member: RawJson | None) -> bool:
    """Whether the member is absent or null."""
    return member is None or bytes(member) == b"null"


def string_or_none(member: RawJson | None) -> str | None:
    """The text of a string; None if it is not one, or if UTF-8 cannot encode it."""
    try:
        return None if member is None else _TEXT.decode(member)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def to_raw(value: Any) -> RawJson:
    """`value`, which may contain raw members, as a raw member: compact, escaped only where necessary."""
    return msgspec.Raw(to_json(value))


def to_json(value: Any) -> bytes:
    """`value`, which may contain raw members, as JSON."""
    return msgspec.json.encode(value)


def _read_leniently(whole: bytes) -> Any:
    if len(whole) > _LENIENT_BYTES:
        raise ValueError("it is malformed, or not in UTF-8")
    return json.loads(whole)


def _escaped(value: Any) -> RawJson:
    return msgspec.Raw(json.dumps(value, separators=(",", ":")).encode())
