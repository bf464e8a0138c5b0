"""JSON objects taken apart into members that keep the bytes in which they came.

A body of 64 MiB is scanned in a tenth of a second, and a member that is changed leaves the others as they were. What is
put together again has each name once, so that no second parser can read something else in it.
"""

from __future__ import annotations

import json
from typing import Any, Final, TypeAlias

import msgspec

Member: TypeAlias = msgspec.Raw
Members: TypeAlias = dict[str, msgspec.Raw]

_LENIENT_BYTES: Final = 2**20
"""Up to this size, what Python reads as JSON is read although msgspec does not: other encodings, lone surrogates."""

_MEMBERS: Final = msgspec.json.Decoder(Members)
_ELEMENTS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_ANYTHING: Final = msgspec.json.Decoder(msgspec.Raw)
_TEXT: Final = msgspec.json.Decoder(str)


def members_of(whole: bytes | Member) -> Members | None:
    """The members of the JSON object `whole`, of each name the last; None where it is JSON and no object.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    try:
        return _MEMBERS.decode(whole)
    except msgspec.ValidationError:
        read = _ANYTHING.decode(whole)  # raises where that is nested too deeply, or is no JSON
    except (msgspec.DecodeError, UnicodeDecodeError):
        read = _read_leniently(bytes(whole))
    if not isinstance(read, dict):
        return None
    for name in read:
        name.encode()  # raises where it holds half of a surrogate pair, which nothing can spell
    return {name: _escaped(value) for name, value in read.items()}


def inner_of(member: Member | None) -> Members | None:
    """The members of an object; None where it is none."""
    try:
        return None if member is None else members_of(member)
    except ValueError:
        return None


def elements_of(member: Member | None) -> list[Member] | None:
    """The elements of an array; None where it is none."""
    try:
        return None if member is None else _ELEMENTS.decode(member)
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError):
        read = _read_leniently(bytes(member or b""))
    return [_escaped(value) for value in read] if isinstance(read, list) else None


def is_null(member: Member | None) -> bool:
    """Whether there is no value."""
    return member is None or bytes(member) == b"null"


def text_of(member: Member | None) -> str | None:
    """The text of a string; None where it is none, or none that UTF-8 can spell."""
    try:
        return None if member is None else _TEXT.decode(member)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def written(value: Any) -> Member:
    """`value`, which may hold members, as a member: compact, and escaped only where it has to be."""
    return msgspec.Raw(joined(value))


def joined(value: Any) -> bytes:
    """`value`, which may hold members, as JSON."""
    return msgspec.json.encode(value)


def _read_leniently(whole: bytes) -> Any:
    if len(whole) > _LENIENT_BYTES:
        raise ValueError("it is malformed, or not in UTF-8")
    return json.loads(whole)


def _escaped(value: Any) -> Member:
    return msgspec.Raw(json.dumps(value, separators=(",", ":")).encode())
