"""What can be set, and which values are refused?

Settings come as JSON in vLLM's `--additional-config '{"tokencake": {"time": {...}, "space": {...}}}'`. A section is a
dataclass whose fields carry their parser, like the records of the protocol; unlike there, an unknown key is an error,
because the operator who wrote it is there to read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from tokencake.protocol import parsing
from tokencake.protocol.parsing import ProtocolError

_Section = TypeVar("_Section")


class SettingsError(ValueError):
    """A key is not known or a value cannot be used; the words name it and what is expected."""


def section(config: object, name: str, kind: type[_Section]) -> _Section:
    """The section `name` of vLLM's `additional_config`, with defaults where it says nothing.

    vLLM takes other things than an object for it; those are not ours.

    Raises:
        SettingsError: an unknown section or key, or a value out of range.
    """
    ours = config.get("tokencake", {}) if isinstance(config, Mapping) else {}
    if not isinstance(ours, dict):
        raise SettingsError(f"additional-config tokencake is {parsing.short_repr(ours)}; expected an object")
    known_sections = ("measure", "registry", "space", "time")
    for key in ours:
        if key not in known_sections:
            raise SettingsError(f"tokencake.{key} is not known; the sections are {', '.join(known_sections)}")
    raw = ours.get(name, {})
    known = sorted(field for field, _, _ in parsing.parsers(kind))
    if isinstance(raw, dict):
        for key in raw:
            if key not in known:
                raise SettingsError(f"tokencake.{name}.{key} is not known; the settings are {', '.join(known)}")
    try:
        return parsing.parse_record(kind, f"tokencake.{name}", raw)
    except ProtocolError as error:
        raise SettingsError(str(error)) from None


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """The section `measure`: what the engine writes down of itself for `tokencake sim calibrate`."""

    steps: int = parsing.optional(parsing.count(100_000), 0)
    """So many of the newest steps are kept with their lengths, for `GET /v1/tokencake/steps`. Default 0: none."""
