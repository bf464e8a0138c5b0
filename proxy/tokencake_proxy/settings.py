"""What can be set on the proxy, and which values are refused?"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


class SettingsError(ValueError):
    """A setting has a value that the proxy cannot work with; the words say which, and what is expected."""


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How the proxy reaches its engine and how much it takes from a client.

    There is no limit on the connections to the engine: a call that waits in the proxy is hidden from the scheduler
    that should weigh it. There is no timeout on answers either, because LLM calls take minutes.

    Raises:
        SettingsError: a value cannot be used.
    """

    upstream: str
    """The engine's base URL without `/v1`; kept without a trailing slash."""
    connect_timeout_s: float = 5.0
    """For name, TCP and TLS together."""
    health_timeout_s: float = 5.0
    """How long `/health` waits for the engine's own `/health`."""
    idle_connection_s: float = 4.0
    """How long an unused connection to the engine is kept. Below vLLM's 5 s, so that the proxy is the one to close."""
    max_body_bytes: int = 64 * 2**20
    """A request's body is held in memory until its answer ends; a longer body is refused with 413."""
    has_tenants: bool = False
    """Whether clients with other API keys are kept apart: their ids are scoped, and each sees its own only."""
    shutdown_grace_s: int = 10
    """How long calls may go on after Ctrl-C or SIGTERM; then they are broken off."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "upstream", _checked_upstream(self.upstream))
        for name in ("connect_timeout_s", "health_timeout_s", "max_body_bytes"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; expected a number above 0")
        for name in ("idle_connection_s", "shutdown_grace_s"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; expected 0 or more seconds")


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
