"""Parser of the engine's settings: JSON in vLLM's `--additional-config '{"tokencake": {"time": {}, "space": {}}}'`.

A section is a dataclass whose fields carry their parser, like the records of the protocol; unlike there, an unknown key
is an error, because the operator reads it at the start. A section with a `PUBLIC` set has the rest under `advanced`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tokencake.policies.registry import BY_SETTING
from tokencake.protocol import parsing
from tokencake.protocol.parsing import ProtocolError

_Section = TypeVar("_Section")


class SettingsError(ValueError):
    """A key is not known or a value cannot be used; the message names it and what is expected."""


def section(config: object, name: str, kind: type[_Section]) -> _Section:
    """The section `name` of vLLM's `additional_config`, with defaults where it says nothing.

    vLLM takes other things than an object for it; those are not ours.

    Raises:
        SettingsError: an unknown section, key or policy, or a value out of range.
    """
    ours = config.get("tokencake", {}) if isinstance(config, Mapping) else {}
    if not isinstance(ours, dict):
        raise SettingsError(f"additional-config tokencake is {parsing.short_repr(ours)}; expected an object")
    known_sections = ("measure", "registry", "space", "time")
    for key in ours:
        if key not in known_sections:
            raise SettingsError(f"tokencake.{key} is not known; the sections are {', '.join(known_sections)}")
    raw = ours.get(name, {})
    if isinstance(raw, dict):
        raw = _with_current_values(name, _flat(raw, name, kind))
    try:
        settings = parsing.parse_record(kind, f"tokencake.{name}", raw)
    except ProtocolError as error:
        raise SettingsError(str(error)) from None
    for setting, registry in BY_SETTING.items():
        of, _, key = setting.partition(".")
        if of == name and getattr(settings, key) not in registry:
            value = parsing.short_repr(getattr(settings, key))
            raise SettingsError(f"tokencake.{setting} is {value}; expected one of {', '.join(registry)}")
    return settings


def _flat(raw: dict[str, Any], name: str, kind: type[Any]) -> dict[str, Any]:
    """The keys of a section and those under its `advanced` in one object; all may stand in the section."""
    known = {field for field, _, _ in parsing.parsers(kind)}
    public = getattr(kind, "PUBLIC", known)
    advanced = raw.get("advanced") if public != known else None
    if advanced is not None and not isinstance(advanced, dict):
        raise SettingsError(f"tokencake.{name}.advanced is {parsing.short_repr(advanced)}; expected an object")
    flat = {key: value for key, value in raw.items() if public == known or key != "advanced"}
    for key in flat:
        if key not in known:
            way_out = f"; those under advanced are {_listed(known - public)}" if public != known else ""
            raise SettingsError(f"tokencake.{name}.{key} is not known; the settings are {_listed(public)}{way_out}")
    for key, value in (advanced or {}).items():
        where = f"tokencake.{name}.advanced.{key}"
        if key in public:
            raise SettingsError(f"{where} does not stand under advanced; write tokencake.{name}.{key}")
        if key not in known:
            raise SettingsError(f"{where} is not known; the settings there are {_listed(known - public)}")
        if key in flat:
            raise SettingsError(f"{where} is set in tokencake.{name}.{key} as well; leave one of them out")
        flat[key] = value
    return flat


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _with_current_values(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Former names of policies in today's terms."""
    match name, raw.get("policy"):
        case _, "ours":
            return {**raw, "policy": "default"}
        case "time", "lru":
            return {"eviction": "lru", **raw, "policy": "default"}
        case _:
            return raw


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """The section `measure`: what the engine writes down of itself for `tokencake sim calibrate`."""

    steps: int = parsing.optional(parsing.count(100_000), 0)
    """How many of the newest steps are kept with their lengths, for `GET /v1/tokencake/steps`. Default 0: none."""
