"""The engine behind the proxy: which one serves a request, and how a request is sent to it.

`choose_upstream` alone decides. There is one engine for now. With several, the information that the choice needs (the
session whose KV an engine holds) becomes its argument, and nothing else changes.
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

    from tokencake_proxy.asgi import Header
    from tokencake_proxy.metrics import ProxyMetrics
    from tokencake_proxy.settings import ProxySettings

_VALID_STATUSES: Final = range(200, 600)

_KEY_CHECK_PATH: Final = b"/v1/models"
_REJECTS_KEY: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_ACCEPTS_KEY: Final = (HTTPStatus.OK, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
"""vLLM checks the key before it looks up the route."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A client's request, ready to be sent to an engine, more than once if necessary."""

    method: str
    target: bytes
    """Path and query as they stood in the request line."""
    headers: list[Header]
    body: bytes


class Upstream:
    """One vLLM server.

    Attributes:
        url: its base URL, without a trailing slash.
        keys: the API keys that it is known to accept.
    """

    def __init__(self, url: str, settings: ProxySettings, metrics: ProxyMetrics) -> None:
        self.url = url
        self.keys = ProvenKeys(self._accepts_key, settings.key_ttl_s)
        self._settings = settings
        self._metrics = metrics
        self._origin = httpx.URL(url)
        self._prefix = self._origin.raw_path.rstrip(b"/")
        self._pooled = ExactTransport(settings.idle_connection_s)
        # A retry over a pooled connection could meet a second one that is stale.
        self._unpooled = ExactTransport(0)

    async def send(self, forwarded: ForwardedRequest) -> httpx.Response:
        """The engine's response; the caller reads its body and closes it.

        The request is sent a second time only if a pooled connection was already closed, so that the engine has not
        begun a response.

        Raises:
            UpstreamError: there is no response.
            Refusal: the request cannot be sent.
        """
        request = self._request(
            forwarded.method, forwarded.target, forwarded.headers, forwarded.body, read_timeout_s=None
        )
        try:
            try:
                response = await self._pooled.handle_async_request(request)
            except StaleConnectionError:
                self._metrics.upstream_retries.inc()
                response = await self._unpooled.handle_async_request(request)
        except httpx.LocalProtocolError as error:
            raise _cannot_be_sent(error) from error
        except httpx.TransportError as error:
            raise self._upstream_error(error) from error
        self._metrics.upstream_retries.inc(response.extensions["connections"] - 1)
        if response.status_code not in _VALID_STATUSES:
            await response.aclose()
            raise self.bad_answer(f"status {response.status_code}")
        return response

    async def health_problem(self) -> str | None:
        """What is wrong with the engine, or None when its `/health` answers 200."""
        request = self._request("GET", b"/health", [], b"", read_timeout_s=self._settings.health_timeout_s)
        try:
            response = await self._pooled.handle_async_request(request)
        except httpx.ReadTimeout:
            return f"GET /health had no answer within {self._settings.health_timeout_s:g} s"
        except httpx.TransportError as error:
            return f"GET /health failed: {error}"
        await response.aclose()
        return None if response.status_code == HTTPStatus.OK else f"GET /health answered {response.status_code}"

    async def _accepts_key(self, headers: list[Header]) -> bool:
        """Whether the engine serves a request with these `headers`: one `authorization` field, or none.

        Raises:
            UpstreamError: the engine did not say.
        """
        timeout_s = self._settings.key_check_timeout_s
        request = self._request("GET", _KEY_CHECK_PATH, headers, b"", read_timeout_s=timeout_s)
        try:
            try:
                response = await self._pooled.handle_async_request(request)
            except StaleConnectionError:
                response = await self._unpooled.handle_async_request(request)
        except httpx.ReadTimeout:
            raise self._key_check_failed(f"had no answer within {timeout_s:g} s (`key_check_timeout_s`)") from None
        except httpx.LocalProtocolError as error:
            raise _cannot_be_sent(error) from error
        except httpx.TransportError as error:
            raise self._upstream_error(error) from error
        await response.aclose()
        if response.status_code in _REJECTS_KEY:
            return False
        if response.status_code in _ACCEPTS_KEY:
            return True
        raise self._key_check_failed(f"answered {response.status_code}")

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pooled.aclose()
        await self._unpooled.aclose()

    def bad_answer(self, problem: str) -> UpstreamError:
        """The error for a response that is not valid HTTP."""
        return UpstreamError(
            HTTPStatus.BAD_GATEWAY,
            "upstream_bad_answer",
            f"{self.url} did not answer in valid HTTP: {problem}. Is this the address of a vLLM server?",
        )

    def broken_stream(self, error: Exception) -> UpstreamError:
        """The error for a response that ended before it was complete."""
        return UpstreamError(
            HTTPStatus.BAD_GATEWAY,
            "upstream_broken_stream",
            f"The engine at {self.url} broke off in the middle of its response ({error}). The received part is "
            "incomplete; see the engine's log, and send the request again.",
        )

    def _request(
        self, method: str, target: bytes, headers: list[Header], body: bytes, *, read_timeout_s: float | None
    ) -> httpx.Request:
        timeout = {"connect": self._settings.connect_timeout_s, "read": read_timeout_s}
        extensions = {"target": self._prefix + target, "timeout": timeout}
        # As a stream, because httpx would add headers for `content`, which the transport writes itself.
        stream = httpx.ByteStream(body)
        return httpx.Request(method, self._origin, headers=headers, stream=stream, extensions=extensions)

    def _key_check_failed(self, problem: str) -> UpstreamError:
        return UpstreamError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "upstream_key_check",
            f"The engine at {self.url} could not check the API key: GET {_KEY_CHECK_PATH.decode()} {problem}. "
            "Try again; see the engine's log.",
        )

    def _upstream_error(self, error: httpx.TransportError) -> UpstreamError:
        match error:
            case httpx.ConnectTimeout():
                return UpstreamError(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "upstream_connect_timeout",
                    f"The engine at {self.url} did not accept the connection within "
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
                    f"The engine at {self.url} closed the connection without a response ({error}). It may have worked "
                    "on the request, so the proxy did not send it again; see the engine's log.",
                )


def _cannot_be_sent(error: httpx.LocalProtocolError) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, "bad_header", f"The request cannot be forwarded: {error}.")


def choose_upstream(upstreams: Sequence[Upstream]) -> Upstream:
    """The engine for the next request."""
    return upstreams[0]
