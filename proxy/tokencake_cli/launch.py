"""Flags and environment with which `tokencake serve --tenants` starts an engine and its proxy."""

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

_KEYS: Final = ("--api-key", "--api_key", "--config")  # a file may name them, too
_CONFIG: Final = "--additional-config"


@dataclass(frozen=True, slots=True)
class Launch:
    """What is added to the two commands."""

    engine_flags: list[str]
    proxy_flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def launch_with_tenants(
    flags: Sequence[str], environ: Mapping[str, str], secret_file: Path | None, *, shares_prefixes: bool
) -> Launch:
    """Both sides keep tenants apart, with one secret.

    Raises:
        StartError: there are no keys to tell tenants by, no secret, or the engine's flags say something else.
    """
    if not environ.get("VLLM_API_KEY") and not any(flag.partition("=")[0] in _KEYS for flag in flags):
        raise StartError("--tenants tells clients apart by their keys; name these: --api-key KEY [KEY ...]")
    try:
        secret = tenant_secret(environ, secret_file).decode()
    except SecretError as error:
        raise StartError(str(error)) from None
    space = {"tenant_mark": TENANT_SEPARATOR, "tenants_share_prefixes": shares_prefixes}
    return Launch(
        _with_setting(flags, "space", space),
        ["--tenants", *(["--tenants-share-prefixes"] if shares_prefixes else [])],
        {SECRET_VARIABLE: secret},
    )


def _with_setting(flags: Sequence[str], section: str, values: Mapping[str, Any]) -> list[str]:
    """vLLM's `flags` with these values in our `section` of `--additional-config`, beside what stands there."""  # noqa: D403
    kept: list[str] = []
    text = "{}"
    rest = iter(flags)
    for flag in rest:
        name, is_joined, value = flag.partition("=")
        if name.replace("_", "-").startswith(f"{_CONFIG}."):
            raise StartError(f"{flag} cannot be joined with --tenants; write {_CONFIG} '{{...}}' as one JSON object")
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
        raise StartError(f"tokencake.{section}.{key} is {value!r} in {_CONFIG}; --tenants wants {values[key]!r}")
    return [*kept, _CONFIG, json.dumps(config)]
