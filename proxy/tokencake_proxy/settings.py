"""Settings of the proxy: each number is a field here, a flag of `tokencake proxy` and an environment variable.

`ProxySettings` is the one source of names, defaults and meanings; `docs/proxy.md` has the same table.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENVIRONMENT_PREFIX: Final = "TOKENCAKE_PROXY_"


class SettingsError(ValueError):
    """A setting has a value that the proxy cannot work with; the words say which, and what is expected."""


def _number(default: float, meaning: str, *, least: Literal["above 0", "of 0 or more"] = "above 0") -> Any:
    """A field that is an `int` where its default is one; `meaning` is the help of its flag."""
    return field(default=default, metadata={"meaning": meaning, "least": least})


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How the proxy reaches its engine and how much it takes from a client.

    There is no limit on the connections to the engine: a call that waits in the proxy is hidden from the scheduler
    that should weigh it. There is no timeout on answers either, because LLM calls take minutes.

    Attributes:
        upstream: the engine's base URL without `/v1`; kept without a trailing slash.
        tenant_secret: what the prefixes and marks of tenants are made of, where clients with other API keys are kept
            apart; the engine has the same. None: all clients are one tenant, and nothing is written anew.
        shares_prefixes: whether calls of different tenants may share cached prefixes; then each can find out what
            others have sent.
        metrics_key: the bearer token that `/metrics` asks for. It counts everybody's requests, so where there are
            tenants and no such key, it is refused.

    Raises:
        SettingsError: a value cannot be used.
    """

    upstream: str
    tenant_secret: bytes | None = field(default=None, repr=False)
    shares_prefixes: bool = False
    metrics_key: str | None = field(default=None, repr=False)

    max_connections: int = _number(4_096, "connections of clients at a time; one more is answered 503 and closed")
    max_head_bytes: int = _number(65_536, "bytes of a request line with its header lines, else 414 or 431")
    max_header_lines: int = _number(256, "header lines of a request, else 431")
    max_pipelined: int = _number(16, "requests that a client may send behind one that is being answered, else 400")
    head_timeout_s: float = _number(
        10.0, "seconds for a head to arrive, else 408; also how long the rest of a refused body is read"
    )
    idle_client_s: float = _number(
        75.0, "seconds that an unused connection of a client is kept; clients close theirs sooner (httpx: 5)"
    )
    send_timeout_s: float = _number(300.0, "seconds that a client may take nothing of its answer, else it is cut off")

    max_body_bytes: int = _number(64 * 2**20, "bytes of a body, else 413")
    max_unproven_body_bytes: int = _number(65_536, "bytes of a body that are read before the engine has taken its key")
    max_bodies_bytes: int = _number(
        2 * 2**30,
        "bytes of all bodies held at a time, else 503; one key may hold as much as is still free, at most half",
    )
    upload_timeout_s: float = _number(60.0, "seconds for a body to arrive, else 408")
    key_ttl_s: float = _number(60.0, "seconds that a key counts as valid after the engine has taken it")
    key_check_timeout_s: float = _number(10.0, "seconds to wait for the engine's word on a key, else 503")

    json_inline_bytes: int = _number(
        2**20,
        "bytes of a body up to which --tenants reads JSON in the proxy's own process, else in another; one of "
        "thousands of strings goes there whatever its size",
    )
    json_memory_bytes: int = _number(2 * 2**30, "bytes of memory that this other process may take, else 413")
    json_processes: int = _number(2, "such processes at a time; other large bodies wait")

    tenant_events_per_s: float = _number(
        1_000.0, "events that one tenant may report in a second, with --tenants; ten seconds' worth at once, else 429"
    )

    connect_timeout_s: float = _number(5.0, "seconds to connect to the engine: name, TCP and TLS together, else 503")
    health_timeout_s: float = _number(5.0, "seconds that /health waits for the engine's own /health")
    idle_connection_s: float = _number(
        4.0, "seconds that an unused connection to the engine is kept; vLLM closes it after 5", least="of 0 or more"
    )
    shutdown_grace_s: int = _number(
        10, "seconds that calls may go on after Ctrl-C or SIGTERM; then they are broken off", least="of 0 or more"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "upstream", _checked_upstream(self.upstream))
        for setting in NUMBERS:
            setting.check(setting.name, getattr(self, setting.name))
        if 2 * self.max_body_bytes > self.max_bodies_bytes:
            raise SettingsError(
                f"max_bodies_bytes is {self.max_bodies_bytes}; expected at least twice max_body_bytes, which is "
                f"{self.max_body_bytes}, because one key may hold half. Raise the one or lower the other"
            )


@dataclass(frozen=True, slots=True)
class Number:
    """A setting that is a number."""

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
        """The environment variable, which counts where the flag is not given."""
        return _ENVIRONMENT_PREFIX + self.name.upper()

    def read(self, source: str, text: str) -> float:
        """The number that `text` stands for; `source` is the flag or the variable that had it."""
        try:
            value = int(text) if isinstance(self.default, int) else float(text)
        except ValueError:
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            raise SettingsError(f"{source} is {text!r}; expected {kind}, for example {self.default}") from None
        self.check(source, value)
        return value

    def check(self, source: str, value: float) -> None:
        """Raise SettingsError for a value out of range."""
        if not (math.isfinite(value) and (value >= 0 if self.least == "of 0 or more" else value > 0)):
            raise SettingsError(f"{source} is {value!r}; expected a number {self.least}, for example {self.default}")


NUMBERS: Final = tuple(
    Number(one.name, one.default, one.metadata["meaning"], one.metadata["least"])
    for one in fields(ProxySettings)
    if one.metadata and one.default is not MISSING
)


def numbers_from(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `ProxySettings` that were set; a flag counts before its variable.

    Args:
        flags: text by name of the setting; None where the flag was not given.
        environment: the process's.

    Raises:
        SettingsError: a text is no number, or out of range.
    """
    found: dict[str, Any] = {}
    for setting in NUMBERS:
        if (text := flags.get(setting.name)) is not None:
            found[setting.name] = setting.read(setting.flag, text)
        elif text := environment.get(setting.variable):
            found[setting.name] = setting.read(setting.variable, text)
    return found


def _checked_upstream(text: str) -> str:
    expected = "expected the engine's base URL, for example http://127.0.0.1:8000"
    if not text.isascii() or not text.isprintable() or " " in text:
        raise SettingsError(f"upstream is {text!r}, which holds characters that no URL has; {expected}")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"upstream is {text!r}: {error}; {expected}") from None
    if parts.scheme not in ("http", "https"):
        raise SettingsError(f"upstream is {text!r}, which does not begin with http:// or https://; {expected}")
    if not parts.hostname or port == 0:
        raise SettingsError(f"upstream is {text!r}, which names no host or no usable port; {expected}")
    if parts.username is not None or parts.query or parts.fragment:
        raise SettingsError(
            f"upstream names user, query or fragment beside {parts.scheme}://{parts.hostname}; {expected}. "
            "A key for the engine comes from each client, in its Authorization header"
        )
    if "." in parts.path.split("/") or ".." in parts.path.split("/"):
        raise SettingsError(f"upstream is {text!r}, whose path walks with dots; {expected}")
    base = text.rstrip("/")
    if parts.path.rstrip("/").endswith("/v1"):
        raise SettingsError(f"upstream is {text!r}; leave off the /v1, clients send it: {base.removesuffix('/v1')}")
    return base
