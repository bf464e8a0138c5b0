"""Flags and environment of the engine and the proxy that `tokencake serve --tenants` starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tokencake.protocol.tenancy import SECRET_VARIABLE, TENANT_SEPARATOR, SecretError
from tokencake_cli.processes import StartError
from tokencake_proxy.secret import tenant_secret

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_KEYS: Final = ("--api-key", "--api_key", "--config")  # a configuration file may hold the keys, too
_CONFIG: Final = "--additional-config"


@dataclass(frozen=True, slots=True)
class ServeFlags:
    """Flags of the two commands, and their common environment."""

    engine_flags: list[str]
    proxy_flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def tenant_flags(
    flags: Sequence[str], environ: Mapping[str, str], secret_file: Path | None, *, shares_prefixes: bool
) -> ServeFlags:
    """The engine's `flags`, and those of the proxy, with tenants isolated on both sides by one secret.

    Raises:
        StartError: there are no API keys, there is no secret, or the engine's flags contradict `--tenants`.
    """
    if not environ.get("VLLM_API_KEY") and not any(flag.partition("=")[0] in _KEYS for flag in flags):
        raise StartError("--tenants tells clients apart by their API keys; give them: --api-key KEY [KEY ...]")
    try:
        secret = tenant_secret(environ, secret_file).decode()
    except SecretError as error:
        raise StartError(str(error)) from None
    space = {"tenant_mark": TENANT_SEPARATOR, "tenants_share_prefixes": shares_prefixes}
    return ServeFlags(
        _with_setting(flags, "space", space),
        ["--tenants", *(["--tenants-share-prefixes"] if shares_prefixes else [])],
        {SECRET_VARIABLE: secret},
    )


def _with_setting(flags: Sequence[str], section: str, values: Mapping[str, Any]) -> list[str]:
    """vLLM's `flags` with `values` added to TokenCake's `section` in `--additional-config`."""  # noqa: D403
    kept: list[str] = []
    text = "{}"
    rest = iter(flags)
    for flag in rest:
        name, is_joined, value = flag.partition("=")
        if name.replace("_", "-").startswith(f"{_CONFIG}."):
            raise StartError(f"{flag} cannot be combined with --tenants; write {_CONFIG} '{{...}}' as one JSON object")
        if name.replace("_", "-") == _CONFIG:
            text = value if is_joined else next(rest, "")
        else:
            kept.append(flag)
    try:
        config = json.loads(text)
        found = config.setdefault("tokencake", {}).setdefault(section, {})
        other = {key: found[key] for key, value in values.items() if found.setdefault(key, value) != value}
    except (ValueError, AttributeError, TypeError):
        raise StartError(f"{_CONFIG} is {text!r}; expected a JSON object of objects") from None
    for key, value in other.items():
        raise StartError(f"tokencake.{section}.{key} is {value!r} in {_CONFIG}; --tenants needs {values[key]!r}")
    return [*kept, _CONFIG, json.dumps(config)]
