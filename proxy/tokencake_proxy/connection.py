"""A client's connection, with limits on the bytes, header fields and seconds of a request.

uvicorn's HTTP protocol over httptools accepts heads of any size and waits for them without a limit. This subclass
limits both, and follows three rules where a parser could be misled:

- An offer to change the protocol (`Upgrade: h2c`, which JDK's client makes, or a WebSocket) is ignored, and the request
  is read as if it had not been made (RFC 9110, 7.8). llhttp would read the body as bytes of the new protocol.
- Trailer fields never become header fields. httptools reports the last trailer when the next request begins.
- A response is written only where it cannot cut another one in two.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tokencake_proxy.errors import Refusal, response_bytes

if TYPE_CHECKING:
    import asyncio

    from tokencake_proxy.asgi import Header
    from tokencake_proxy.refusal_log import RefusalLog
    from tokencake_proxy.settings import ProxySettings

_LINGER_S: Final = 1.0
"""How long further input is discarded after a refusal; closing at once could destroy the response."""
_LINGER_BYTES: Final = 2**20

_UNREADABLE: Final = Refusal(
    HTTPStatus.BAD_REQUEST, "bad_request", "This is not valid HTTP/1.1, so it is not certain where the request ends."
)
_CONNECT: Final = Refusal(
    HTTPStatus.NOT_IMPLEMENTED, "method", "This proxy opens no tunnels (CONNECT). Send requests to the proxy itself."
)
_PIPELINED: Final = Refusal(
    HTTPStatus.BAD_REQUEST,
    "bad_request",
    "The client sent too many requests (`max_pipelined`), or one after a chunked one, without waiting for responses.",
)


def connection_class(settings: ProxySettings, refusal_log: RefusalLog) -> type[ClientConnection]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    return type("BoundedConnection", (ClientConnection,), {"settings": settings, "refusal_log": refusal_log})


class ClientConnection(HttpToolsProtocol):
    """One client's connection. uvicorn creates it, so its settings are class attributes (see `connection_class`)."""

    settings: ClassVar[ProxySettings]
    refusal_log: ClassVar[RefusalLog]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._is_head_open = False
        self._is_chunked = False
        self._needs_new_parser = False
        self._is_upgrade_offered = False
        self._upgrade_headers: list[Header] = []
        """The `Upgrade` fields of a head that is being parsed again without them."""
        self._is_refused = False
        self._fault: Refusal | None = None
        self._answered: RequestResponseCycle | None = None
        """The request that is being answered. `cycle` is the latest request, `pipeline` holds those between."""
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._pending_bytes = 0
        """Bytes received since the last complete head or piece of a body."""

    # --- the transport ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Accept the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(_too_many_connections(self.settings.max_connections))
            self.transport.close()  # at once: lingering would keep more connections open than the limit
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all requests of the connection. uvicorn itself tells only the last one."""
        self._stop_timer()
        self._stop_send_timer()
        self.pipeline.clear()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait until the client reads what was sent, at most `send_timeout_s`."""
        super().pause_writing()
        self._stop_send_timer()
        self._send_timer = self.loop.call_later(self.settings.send_timeout_s, self._on_send_timeout)

    def resume_writing(self) -> None:
        """Continue sending."""
        self._stop_send_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse `data`, or discard it if the connection is refused."""
        self._unset_keepalive_if_required()
        self._pending_bytes += len(data)
        if self._is_refused:
            if self._pending_bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
            except httptools.HttpParserError:
                self._refuse(self._fault or _UNREADABLE)
                return
            else:
                break
        if self._needs_new_parser:
            self._renew_parser()
        cycle = self.cycle
        if self._pending_bytes > self.settings.max_head_bytes:
            self._refuse(self._too_long())
        elif self._timer is None and (
            self._is_head_open or cycle is None or cycle.response_complete or cycle.more_body
        ):
            self._start_timer()

    def _renew_parser(self) -> None:
        self._needs_new_parser = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_upgrade(self) -> bytes:
        method = self.parser.get_method()
        version = self.parser.get_http_version().encode()
        self._is_upgrade_offered = False
        self._renew_parser()
        headers = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
        return b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, headers)

    # --- the parser ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Start a request."""
        if self._needs_new_parser or len(self.pipeline) >= self.settings.max_pipelined:
            # After a chunked request this parser may still hold a trailer, and would read it as a field of this head.
            self._abort_parsing(_PIPELINED)
        self._is_head_open = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Pass the request to the application, unless its head must be parsed again without an upgrade."""
        settings = self.settings
        if len(self.headers) > settings.max_header_lines or (
            self._pending_bytes > settings.max_head_bytes and self._head_bytes() > settings.max_head_bytes
        ):
            self._abort_parsing(self._too_long())
        self._pending_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._abort_parsing(_CONNECT)
            self._is_upgrade_offered = True
            self._upgrade_headers = [header for header in self.headers if header[0] == b"upgrade"]
            return
        if self._upgrade_headers:
            self.headers += self._upgrade_headers
            self._upgrade_headers = []
        self._is_head_open = False
        self._stop_timer()
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle
        self.headers = []  # for trailers; the request has the other list

    def on_chunk_header(self) -> None:
        """The body is chunked, so trailers may follow."""
        self._is_chunked = True

    def on_body(self, body: bytes) -> None:
        """Receive a piece of the body."""
        self._pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        if self._is_upgrade_offered:
            return
        if len(self.headers) > self.settings.max_header_lines:  # trailers
            self._abort_parsing(self._too_long())
        self._pending_bytes = 0
        self._needs_new_parser, self._is_chunked = self._is_chunked, False
        self._stop_timer()
        super().on_message_complete()
        self.cycle.more_body = False  # even if the response is complete already

    def on_response_complete(self) -> None:
        """Continue with the next request, or discard the rest of a request that was answered early."""
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self.cycle.body = bytearray()
            self._stop_timer()
            self._start_timer()

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _abort_parsing(self, refusal: Refusal) -> None:
        """Stop the parser: httptools turns an exception in a callback into an HttpParserError."""
        self._fault = refusal
        raise _StoppedError

    # --- time ---------------------------------------------------------------------------------------

    def _start_timer(self) -> None:
        is_upload = self.cycle is not None and not self.cycle.response_complete and not self._is_head_open
        wait_s = self.settings.upload_timeout_s if is_upload else self.settings.head_timeout_s
        self._timer = self.loop.call_later(wait_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        cycle = self.cycle
        if self._is_refused or (cycle is not None and cycle.response_complete and cycle.more_body):
            self.transport.close()
        elif cycle is not None and not cycle.response_complete:
            if self._is_head_open or self.pipeline:
                self._start_timer()  # a request that follows one that is being answered
            else:
                self._refuse(_upload_timeout(self.settings.upload_timeout_s))
        elif self._is_head_open or self._pending_bytes:
            self._refuse(_head_timeout(self.settings.head_timeout_s))
        else:
            self.transport.close()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _on_send_timeout(self) -> None:
        self.refusal_log.record(_send_timeout(self.settings.send_timeout_s), self.client)
        self.transport.abort()

    # --- refusing -----------------------------------------------------------------------------------

    def _too_long(self) -> Refusal:
        return _too_long(
            self.settings, is_in_target=self._is_head_open and len(self.url) > self.settings.max_head_bytes // 2
        )

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with `refusal` where a response may be written, stop parsing, and close soon."""
        self.refusal_log.record(refusal, self.client)
        self._is_refused = True
        self._pending_bytes = 0
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            belongs_to_cycle = cycle.more_body and not self._is_head_open
            if self.pipeline or not belongs_to_cycle or cycle.response_started:
                # Earlier responses must be completed first.
                cycle.keep_alive = False
                if belongs_to_cycle:
                    self.transport.close()
                return
            cycle.disconnected = True  # tells the application that the client is gone, so that it writes nothing
            cycle.message_event.set()
        self.parser = self.headers = None  # type: ignore[assignment]  # frees them, as uvicorn does
        self.transport.write(response_bytes(refusal))
        self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_S, self._on_timeout)


class _StoppedError(Exception):
    """Ends the parsing."""


def _too_long(settings: ProxySettings, *, is_in_target: bool) -> Refusal:
    status = HTTPStatus.REQUEST_URI_TOO_LONG if is_in_target else HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return Refusal(
        status,
        "head_too_long",
        f"The request's head has more than {settings.max_head_bytes} bytes (`max_head_bytes`) or "
        f"{settings.max_header_lines} header fields (`max_header_lines`), the limits of this proxy. Send less.",
    )


def _head_timeout(head_timeout_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "head_timeout",
        f"The request's head did not arrive within {head_timeout_s:g} s (`head_timeout_s`). Send it again.",
    )


def _upload_timeout(upload_timeout_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "upload_timeout",
        f"The request's body did not arrive within {upload_timeout_s:g} s (`upload_timeout_s`). Send it again.",
    )


def _send_timeout(send_timeout_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "send_timeout",
        f"The client read nothing of its response for {send_timeout_s:g} s (`send_timeout_s`).",
    )


def _too_many_connections(max_connections: int) -> Refusal:
    return Refusal(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "too_many_connections",
        f"This proxy serves {max_connections} connections at a time (`max_connections`). Try again later.",
        [(b"retry-after", b"1")],
    )
