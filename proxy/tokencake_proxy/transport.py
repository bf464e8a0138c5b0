"""An HTTP transport that sends a request exactly as the client wrote it.

It replaces one method of httpx-aiohttp's transport, which normalises URLs, joins repeated headers, and reports an
engine that hangs up as a timeout. The session behind it adds no header, keeps no cookie (it would send one client's
cookie for the next), opens any number of connections and waits for responses without a limit.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import ssl
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import aiohttp
import httpx
from aiohttp.http_exceptions import HttpProcessingError
from httpx_aiohttp import AiohttpTransport
from multidict import CIMultiDict
from yarl import URL

if TYPE_CHECKING:
    from types import SimpleNamespace

_MAX_RESPONSE_LINE_BYTES: Final = 65_536
_MAX_RESPONSE_HEADERS: Final = 1_000
_SENT_AT_ONCE_BYTES: Final = 2**20
"""A longer body is given to aiohttp as a file, which it writes in pieces."""

_MALFORMED_CHECK_S: Final = 5.0
"""How often a body that stopped arriving is checked for being malformed."""

_FRAMING: Final = frozenset({b"host", b"content-length", b"transfer-encoding"})
_PEER_HUNG_UP: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ESHUTDOWN, errno.ENOTCONN})


class StaleConnectionError(httpx.ReadError):
    """A pooled connection was closed before the first byte of a response: the request may be sent once more."""


@dataclass(slots=True)
class _Attempt:
    connections: int = 0
    """Two if aiohttp itself has repeated an idempotent request."""
    is_reused: bool = False


class ExactTransport(AiohttpTransport):
    """Sends a request's target, headers and body unchanged.

    The target is taken from httpx's `target` extension, timeouts (`connect` and `read`, in seconds) from `timeout`.
    A response's `connections` extension says how many connections were tried.

    Args:
        idle_connection_s: how long an unused connection is kept; 0 opens a connection for every request.
    """

    def __init__(self, idle_connection_s: float) -> None:
        super().__init__(verify=_tls_context(), client=self._open_session)
        self._idle_connection_s = idle_connection_s

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return as soon as the head of the response has arrived.

        Raises:
            httpx.ConnectError, httpx.ConnectTimeout: nothing was sent.
            StaleConnectionError: sent on a connection that was already closed.
            httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError: sent, without a valid response.
            httpx.LocalProtocolError: cannot be sent unchanged, because a header is not UTF-8.
        """
        if not isinstance(self.client, aiohttp.ClientSession):
            self.client = self.get_client()
        target: bytes = request.extensions.get("target", request.url.raw_path)
        url = f"{request.url.scheme}://{request.url.netloc.decode('ascii')}{target.decode('ascii')}"
        timeout = request.extensions.get("timeout", {})
        body = await request.aread()
        attempt = _Attempt()
        try:
            answer = await self.client.request(
                request.method,
                URL(url, encoded=True),
                headers=_decoded(request),
                data=(io.BytesIO(body) if len(body) > _SENT_AT_ONCE_BYTES else body) or None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(connect=timeout.get("connect"), sock_read=timeout.get("read")),
                trace_request_ctx=attempt,
            )
        except aiohttp.ClientError as error:
            raise _to_httpx_error(error, attempt, request) from error
        return httpx.Response(
            answer.status,
            headers=list(answer.raw_headers),
            stream=_ResponseBody(
                answer
            ),  # without `request=request`, which would keep its body in memory until the response ends
            extensions={"connections": attempt.connections},
        )

    def _open_session(self) -> aiohttp.ClientSession:
        keeps_connections = self._idle_connection_s > 0
        connections = aiohttp.TCPConnector(
            limit=0,
            ssl=self.ssl_context,
            keepalive_timeout=self._idle_connection_s if keeps_connections else None,
            force_close=not keeps_connections,
        )
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_create_end.append(_on_created)
        tracing.on_connection_reuseconn.append(_on_reused)
        return aiohttp.ClientSession(
            connector=connections,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            trace_configs=[tracing],
            max_line_size=_MAX_RESPONSE_LINE_BYTES,
            max_field_size=_MAX_RESPONSE_LINE_BYTES,
            max_headers=_MAX_RESPONSE_HEADERS,
        )


class _ResponseBody(httpx.AsyncByteStream):
    """A response body, in the pieces that arrive. Closing it early closes the connection, which stops the engine."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        # None if the whole body came with the head.
        self._protocol = answer.connection.protocol if answer.connection is not None else None

    def __aiter__(self) -> _ResponseBody:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await self._read()
        except TimeoutError as error:
            raise httpx.ReadTimeout(_describe(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise httpx.ReadError(_describe(error)) from error
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        self._answer.release()

    async def _read(self) -> bytes:
        content = self._answer.content
        if (piece := content.read_nowait()) or content.at_eof():
            return piece  # saves the cost of a timer
        while True:
            try:
                async with asyncio.timeout(_MALFORMED_CHECK_S) as check:
                    return await content.readany()
            except TimeoutError:
                if not check.expired():
                    raise
            # aiohttp 3.14 closes a connection with malformed chunks without waking the reader of the body.
            problem = self._protocol.exception() if self._protocol is not None else None
            if isinstance(problem, HttpProcessingError):
                raise aiohttp.ClientPayloadError(problem.message)


@cache
def _tls_context() -> ssl.SSLContext:
    """Verifies with certifi's authorities, or with those of `SSL_CERT_FILE` and `SSL_CERT_DIR`. Slow to load."""
    return httpx.create_ssl_context()


def _decoded(request: httpx.Request) -> CIMultiDict[str]:
    """The headers as text, which aiohttp encodes as UTF-8 to the same bytes."""
    try:
        return CIMultiDict(
            (name.decode(), value.decode()) for name, value in request.headers.raw if name.lower() not in _FRAMING
        )
    except UnicodeDecodeError as error:
        raise httpx.LocalProtocolError(
            f"a header holds {error.object!r}, which is not UTF-8", request=request
        ) from None


def _to_httpx_error(error: aiohttp.ClientError, attempt: _Attempt, request: httpx.Request) -> httpx.TransportError:
    words = _describe(error)
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx.ConnectTimeout(words, request=request)
        case aiohttp.ClientConnectorError():
            return httpx.ConnectError(words, request=request)
        case aiohttp.SocketTimeoutError():
            return httpx.ReadTimeout(words, request=request)
        case aiohttp.ClientConnectionError():
            kind = StaleConnectionError if attempt.is_reused and _is_unanswered(error) else httpx.ReadError
            return kind(words, request=request)
        case _:
            return httpx.RemoteProtocolError(words, request=request)


def _is_unanswered(error: aiohttp.ClientConnectionError) -> bool:
    match error:
        case aiohttp.ServerDisconnectedError():
            return isinstance(error.message, str)  # else it is the part of the response that had arrived
        case OSError():
            # While a body is being written, aiohttp wraps the informative error in one without a number.
            is_reset = isinstance(error, ConnectionResetError) or isinstance(error.__cause__, ConnectionResetError)
            return is_reset or error.errno in _PEER_HUNG_UP
        case _:
            return False


def _describe(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
        cause = error.os_error  # the error's own text mentions TLS even without TLS
        return os.strerror(cause.errno) if cause.errno and cause.errno > 0 else str(cause)
    return " ".join(str(error).split()) or type(error).__name__


async def _on_created(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    _count(context.trace_request_ctx, is_reused=False)


async def _on_reused(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    _count(context.trace_request_ctx, is_reused=True)


def _count(attempt: _Attempt, *, is_reused: bool) -> None:
    attempt.connections += 1
    attempt.is_reused = is_reused
