"""The proxy's settings. Each number is a field, a flag of `tokencake proxy` and an environment variable.

`ProxySettings` is the only source of names, defaults and meanings; `docs/proxy.md` has the same table.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

from tokencake.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENVIRONMENT_PREFIX: Final = "TOKENCAKE_PROXY_"


def _number(default: float, meaning: str, *, least: Literal["above 0", "of 0 or more"] = "above 0") -> Any:
    """A numeric field, an `int` if its default is one. `meaning` is the help text of its flag."""
    return field(default=default, metadata={"meaning": meaning, "least": least})


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How the proxy reaches its engine, and the limits on what a client may send.

    The connections to the engine are not limited: the scheduler could not rank a call that waits in the proxy. There
    is no timeout on responses either, because LLM calls take minutes.

    Attributes:
        upstream: the engine's base URL without `/v1`; kept without a trailing slash.
        tenant_secret: isolates clients with different API keys; prefixes and marks of tenants are derived from it, and
            the engine has the same secret. None: all clients are one tenant, and no request is rewritten.
        shares_prefixes: whether requests of different tenants may share cached prefixes; each can then find out
            what others have sent.
        metrics_key: the bearer token that `/metrics` requires. With tenants and without this key `/metrics` is
            refused, because it counts the requests of all clients.

    Raises:
        SettingsError: a value is invalid.
    """

    upstream: str
    tenant_secret: bytes | None = field(default=None, repr=False)
    shares_prefixes: bool = False
    metrics_key: str | None = field(default=None, repr=False)

    max_connections: int = _number(4_096, "client connections at a time; a further one gets 503 and is closed")
    max_head_bytes: int = _number(65_536, "bytes of a request line with its header fields, else 414 or 431")
    max_header_lines: int = _number(256, "header fields of a request, else 431")
    max_pipelined: int = _number(16, "requests that a client may send while one is being answered, else 400")
    head_timeout_s: float = _number(
        10.0,
        "seconds for the head of a request to arrive, else 408; also how long the rest of a refused body is read",
    )
    idle_client_s: float = _number(
        75.0, "seconds that an unused client connection stays open; clients close theirs sooner (httpx: 5)"
    )
    send_timeout_s: float = _number(
        300.0, "seconds that a client may read nothing of its response, else the connection is closed"
    )

    max_body_bytes: int = _number(64 * 2**20, "bytes of a body, else 413")
    max_unproven_body_bytes: int = _number(
        65_536, "bytes of a body that are read before the engine has accepted its key"
    )
    max_bodies_bytes: int = _number(
        2 * 2**30,
        "bytes of all bodies in memory, else 503; one key may hold as much as is still free, at most half",
    )
    upload_timeout_s: float = _number(60.0, "seconds for a body to arrive, else 408")
    key_ttl_s: float = _number(60.0, "seconds that a key counts as valid after the engine has accepted it")
    key_check_timeout_s: float = _number(10.0, "seconds to wait for the engine's check of a key, else 503")

    json_inline_bytes: int = _number(
        2**20,
        "bytes of a body up to which --tenants parses JSON in the proxy's own process, else in a worker process; a "
        "body of thousands of strings always goes to a worker",
    )
    json_memory_bytes: int = _number(2 * 2**30, "bytes of memory of one worker process, else 413")
    json_processes: int = _number(2, "worker processes at a time; further large bodies wait")

    tenant_events_per_s: float = _number(
        1_000.0, "events per second of one tenant, with --tenants; ten seconds' worth at once, else 429"
    )

    connect_timeout_s: float = _number(5.0, "seconds to connect to the engine (name lookup, TCP and TLS), else 503")
    health_timeout_s: float = _number(5.0, "seconds that /health waits for the engine's own /health")
    idle_connection_s: float = _number(
        4.0, "seconds that an unused connection to the engine stays open; vLLM closes it after 5", least="of 0 or more"
    )
    shutdown_grace_s: int = _number(
        10, "seconds that calls may continue after Ctrl-C or SIGTERM; then they are aborted", least="of 0 or more"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "upstream", _checked_upstream(self.upstream))
        for setting in NUMBER_SETTINGS:
            setting.check(setting.name, getattr(self, setting.name))
        if 2 * self.max_body_bytes > self.max_bodies_bytes:
            raise SettingsError(
                f"max_bodies_bytes is {self.max_bodies_bytes}; expected at least twice max_body_bytes, which is "
                f"{self.max_body_bytes}, because one key may hold half. Raise the former or lower the latter"
            )


@dataclass(frozen=True, slots=True)
class NumberSetting:
    """The description of a numeric setting."""

    name: str
    default: float
    meaning: str
    least: Literal["above 0", "of 0 or more"]

    @property
    def flag(self) -> str:
        """The flag of `tokencake proxy`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable, used if the flag is not given."""
        return _ENVIRONMENT_PREFIX + self.name.upper()

    def read(self, source: str, text: str) -> float:
        """The number in `text`; `source` names the flag or variable in errors."""
        try:
            value = int(text) if isinstance(self.default, int) else float(text)
        except ValueError:
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            raise SettingsError(f"{source} is {text!r}; expected {kind}, for example {self.default}") from None
        self.check(source, value)
        return value

    def check(self, source: str, value: float) -> None:
        """Raise SettingsError if `value` is out of range."""
        if not (math.isfinite(value) and (value >= 0 if self.least == "of 0 or more" else value > 0)):
            raise SettingsError(f"{source} is {value!r}; expected a number {self.least}, for example {self.default}")


NUMBER_SETTINGS: Final = tuple(
    NumberSetting(one.name, one.default, one.metadata["meaning"], one.metadata["least"])
    for one in fields(ProxySettings)
    if one.metadata and one.default is not MISSING
)


def read_number_settings(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> dict[str, Any]:
    """The numeric arguments of `ProxySettings` that are set; a flag overrides its variable.

    Args:
        flags: name of the setting -> text; None if the flag was not given.
        environment: the process's.

    Raises:
        SettingsError: a text is not a number, or is out of range.
    """
    found: dict[str, Any] = {}
    for setting in NUMBER_SETTINGS:
        if (text := flags.get(setting.name)) is not None:
            found[setting.name] = setting.read(setting.flag, text)
        elif text := environment.get(setting.variable):
            found[setting.name] = setting.read(setting.variable, text)
    return found


def _checked_upstream(text: str) -> str:
    expected = "expected the engine's base URL, for example http://127.0.0.1:8000"
    if not text.isascii() or not text.isprintable() or " " in text:
        raise SettingsError(
            f"upstream is {text!r}, which contains characters that are not allowed in a URL; {expected}"
        )
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"upstream is {text!r}: {error}; {expected}") from None
    if parts.scheme not in ("http", "https"):
        raise SettingsError(f"upstream is {text!r}, which does not begin with http:// or https://; {expected}")
    if not parts.hostname or port == 0:
        raise SettingsError(f"upstream is {text!r}, which has no host or no usable port; {expected}")
    if parts.username is not None or parts.query or parts.fragment:
        raise SettingsError(
            f"upstream has a user, query or fragment beside {parts.scheme}://{parts.hostname}; {expected}. "
            "Each client sends its own key for the engine, in its Authorization header"
        )
    if "." in parts.path.split("/") or ".." in parts.path.split("/"):
        raise SettingsError(f"upstream is {text!r}, whose path has dot segments; {expected}")
    base = text.rstrip("/")
    if parts.path.rstrip("/").endswith("/v1"):
        raise SettingsError(f"upstream is {text!r}; omit the /v1, clients send it: {base.removesuffix('/v1')}")
    return base
