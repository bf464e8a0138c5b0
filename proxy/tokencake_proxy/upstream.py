"""Which engine answers a request, and how is it asked?

`choose_engine` is the one place that decides. There is one engine for now; with several, what it needs to know of the
request (the session whose KV an engine holds) becomes its argument, and nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import httpx

from tokencake_proxy.errors import Refusal, UpstreamError
from tokencake_proxy.keys import ProvenKeys
from tokencake_proxy.transport import ExactTransport, StaleConnectionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencake_proxy.asgi import HeaderLine
    from tokencake_proxy.metrics import ProxyMetrics
    from tokencake_proxy.settings import ProxySettings

_ANSWER_STATUSES: Final = range(200, 600)

_GUARDED_PATH: Final = b"/v1/models"
_REFUSES_KEY: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_TAKES_KEY: Final = (HTTPStatus.OK, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
"""vLLM looks at the key before it looks for the route."""


@dataclass(frozen=True, slots=True)
class Call:
    """A client's request, ready to be sent to an engine, more than once if need be."""

    method: str
    target: bytes
    """Path and query as they stood in the request line."""
    lines: list[HeaderLine]
    body: bytes


class Engine:
    """One vLLM server.

    Attributes:
        url: its base URL, without a trailing slash.
        keys: the API keys that it is known to take.
    """

    def __init__(self, url: str, settings: ProxySettings, metrics: ProxyMetrics) -> None:
        self.url = url
        self.keys = ProvenKeys(self._takes_key, settings.key_ttl_s)
        self._settings = settings
        self._metrics = metrics
        self._origin = httpx.URL(url)
        self._prefix = self._origin.raw_path.rstrip(b"/")
        self._kept = ExactTransport(settings.idle_connection_s)
        # A retry over a kept connection could meet a second one that is stale.
        self._fresh = ExactTransport(0)

    async def answer(self, call: Call) -> httpx.Response:
        """The engine's response to `call`, its body still to be read and closed by the caller.

        Sent a second time only when a kept connection was already closed, so that the engine has not begun an answer.

        Raises:
            UpstreamError: there is no answer.
            Refusal: the call cannot be sent.
        """
        request = self._request(call.method, call.target, call.lines, call.body, read_timeout_s=None)
        try:
            try:
                response = await self._kept.handle_async_request(request)
            except StaleConnectionError:
                self._metrics.upstream_retries.inc()
                response = await self._fresh.handle_async_request(request)
        except httpx.LocalProtocolError as error:
            raise _cannot_be_sent(error) from error
        except httpx.TransportError as error:
            raise self._upstream_error(error) from error
        self._metrics.upstream_retries.inc(response.extensions["connections"] - 1)
        if response.status_code not in _ANSWER_STATUSES:
            await response.aclose()
            raise self.bad_answer(f"status {response.status_code}")
        return response

    async def ailment(self) -> str | None:
        """What is wrong with the engine, or None when its `/health` answers 200."""
        request = self._request("GET", b"/health", [], b"", read_timeout_s=self._settings.health_timeout_s)
        try:
            response = await self._kept.handle_async_request(request)
        except httpx.ReadTimeout:
            return f"GET /health had no answer within {self._settings.health_timeout_s:g} s"
        except httpx.TransportError as error:
            return f"GET /health failed: {error}"
        await response.aclose()
        return None if response.status_code == HTTPStatus.OK else f"GET /health answered {response.status_code}"

    async def _takes_key(self, lines: list[HeaderLine]) -> bool:
        """Whether the engine serves a request with these header lines, one `authorization` or none.

        Raises:
            UpstreamError: it cannot be told.
        """
        timeout_s = self._settings.key_check_timeout_s
        request = self._request("GET", _GUARDED_PATH, lines, b"", read_timeout_s=timeout_s)
        try:
            try:
                response = await self._kept.handle_async_request(request)
            except StaleConnectionError:
                response = await self._fresh.handle_async_request(request)
        except httpx.ReadTimeout:
            raise self._no_word(f"had no answer within {timeout_s:g} s (`key_check_timeout_s`)") from None
        except httpx.LocalProtocolError as error:
            raise _cannot_be_sent(error) from error
        except httpx.TransportError as error:
            raise self._upstream_error(error) from error
        await response.aclose()
        if response.status_code in _REFUSES_KEY:
            return False
        if response.status_code in _TAKES_KEY:
            return True
        raise self._no_word(f"answered {response.status_code}")

    async def aclose(self) -> None:
        """Close all connections."""
        await self._kept.aclose()
        await self._fresh.aclose()

    def bad_answer(self, problem: str) -> UpstreamError:
        """The error for an answer that no client could make sense of."""
        return UpstreamError(
            HTTPStatus.BAD_GATEWAY,
            "upstream_bad_answer",
            f"{self.url} did not answer in proper HTTP: {problem}. Is this the address of a vLLM server?",
        )

    def broken_stream(self, error: Exception) -> UpstreamError:
        """The error for an answer that ended before it was complete."""
        return UpstreamError(
            HTTPStatus.BAD_GATEWAY,
            "upstream_broken_stream",
            f"The engine at {self.url} broke off in the middle of its answer ({error}). What was received is "
            "incomplete; see the engine's log, and send the request again.",
        )

    def _request(
        self, method: str, target: bytes, lines: list[HeaderLine], body: bytes, *, read_timeout_s: float | None
    ) -> httpx.Request:
        timeout = {"connect": self._settings.connect_timeout_s, "read": read_timeout_s}
        extensions = {"target": self._prefix + target, "timeout": timeout}
        # As a stream, because httpx works out headers for `content`, which the transport writes itself.
        stream = httpx.ByteStream(body)
        return httpx.Request(method, self._origin, headers=lines, stream=stream, extensions=extensions)

    def _no_word(self, problem: str) -> UpstreamError:
        return UpstreamError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "upstream_key_check",
            f"Whether the engine at {self.url} takes the API key is not known: GET {_GUARDED_PATH.decode()} {problem}. "
            "Try again; see the engine's log.",
        )

    def _upstream_error(self, error: httpx.TransportError) -> UpstreamError:
        match error:
            case httpx.ConnectTimeout():
                return UpstreamError(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "upstream_connect_timeout",
                    f"The engine at {self.url} did not take the connection within "
                    f"{self._settings.connect_timeout_s:g} s. Check the address given as --upstream, and firewalls.",
                )
            case httpx.ConnectError():
                return UpstreamError(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "upstream_unreachable",
                    f"The engine at {self.url} cannot be reached ({error}). Start it, or give the address of a "
                    "running one: tokencake proxy --upstream URL.",
                )
            case httpx.RemoteProtocolError():
                return self.bad_answer(str(error))
            case _:
                return UpstreamError(
                    HTTPStatus.BAD_GATEWAY,
                    "upstream_disconnected",
                    f"The engine at {self.url} closed the connection without an answer ({error}). It may have worked "
                    "on the request, so it was not sent again; see the engine's log.",
                )


def _cannot_be_sent(error: httpx.LocalProtocolError) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, "bad_header", f"The request cannot be forwarded: {error}.")


def choose_engine(engines: Sequence[Engine]) -> Engine:
    """The engine for the next request."""
    return engines[0]
