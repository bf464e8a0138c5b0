"""A client's connection up to the moment at which its request is known: bounded in bytes, lines and seconds.

uvicorn's HTTP protocol over httptools takes heads of any size and waits for them without end. This subclass bounds
both, and holds to three rules where a parser could be led astray:

- An offer to change the protocol (`Upgrade: h2c`, which JDK's client makes, or a WebSocket) is not taken, and the
  request is read as if it had not been made (RFC 9110, 7.8). llhttp would take the body for the new protocol's bytes.
- Trailer fields never become header fields. httptools reports the last one when the next request begins.
- An answer is written only where it cannot fall into the middle of another one.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tokencake_proxy.errors import Refusal, whole_response

if TYPE_CHECKING:
    import asyncio

    from tokencake_proxy.asgi import HeaderLine
    from tokencake_proxy.refusals import Refusals
    from tokencake_proxy.settings import ProxySettings

_LINGER_S: Final = 1.0
"""How long what a client still sends is thrown away after a refusal; to close at once could destroy the answer."""
_LINGER_BYTES: Final = 2**20

_UNREADABLE: Final = Refusal(
    HTTPStatus.BAD_REQUEST, "bad_request", "This is not proper HTTP/1.1, so where the request ends is not certain."
)
_CONNECT: Final = Refusal(
    HTTPStatus.NOT_IMPLEMENTED, "method", "This proxy opens no tunnels (CONNECT); send requests to it."
)
_PIPELINED: Final = Refusal(
    HTTPStatus.BAD_REQUEST,
    "bad_request",
    "Too many requests (`max_pipelined`), or one behind a chunked one, were sent without waiting for answers.",
)


def connection_class(settings: ProxySettings, refusals: Refusals) -> type[Connection]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    return type("BoundedConnection", (Connection,), {"settings": settings, "refusals": refusals})


class Connection(HttpToolsProtocol):
    """One client's connection. uvicorn makes it, so what it needs stands in its class (`connection_class`)."""

    settings: ClassVar[ProxySettings]
    refusals: ClassVar[Refusals]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._is_head_open = False
        self._is_chunked = False
        self._is_parser_used_up = False
        self._is_offer_open = False
        self._offer: list[HeaderLine] = []
        """The `Upgrade` lines of a head that is being read again without them."""
        self._is_refused = False
        self._fault: Refusal | None = None
        self._answered: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the last one that came, `pipeline` has those between."""
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._unheard_bytes = 0
        """Taken in since the parser last came to the end of a head, or to a piece of a body."""

    # --- the transport ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Take the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(_too_many(self.settings.max_connections))
            self.transport.close()  # without lingering, which would keep more than the limit open
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything, and of all requests that came together. uvicorn tells the last one only."""
        self._stop_timer()
        self._stop_send_timer()
        self.pipeline.clear()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to take what was sent, but not without end."""
        super().pause_writing()
        self._stop_send_timer()
        self._send_timer = self.loop.call_later(self.settings.send_timeout_s, self._give_up_sending)

    def resume_writing(self) -> None:
        """Send on."""
        self._stop_send_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse `data`, or throw it away if the connection is refused."""
        self._unset_keepalive_if_required()
        self._unheard_bytes += len(data)
        if self._is_refused:
            if self._unheard_bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]
            except httptools.HttpParserError:
                self._refuse(self._fault or _UNREADABLE)
                return
            else:
                break
        if self._is_parser_used_up:
            self._renew_parser()
        cycle = self.cycle
        if self._unheard_bytes > self.settings.max_head_bytes:
            self._refuse(self._too_long())
        elif self._timer is None and (
            self._is_head_open or cycle is None or cycle.response_complete or cycle.more_body
        ):
            self._start_timer()

    def _renew_parser(self) -> None:
        self._is_parser_used_up = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_offer(self) -> bytes:
        method = self.parser.get_method()
        version = self.parser.get_http_version().encode()
        self._is_offer_open = False
        self._renew_parser()
        lines = b"".join(b"%s: %s\r\n" % line for line in self.headers if line[0] != b"upgrade")
        return b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, lines)

    # --- the parser ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._is_parser_used_up or len(self.pipeline) >= self.settings.max_pipelined:
            # After a chunked request this parser may still hold a trailer, and would take it for a line of this head.
            self._stop(_PIPELINED)
        self._is_head_open = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Hand the request to the application, unless it has to be read again without an offer."""
        settings = self.settings
        if len(self.headers) > settings.max_header_lines or (
            self._unheard_bytes > settings.max_head_bytes and self._head_bytes() > settings.max_head_bytes
        ):
            self._stop(self._too_long())
        self._unheard_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._stop(_CONNECT)
            self._is_offer_open = True
            self._offer = [line for line in self.headers if line[0] == b"upgrade"]
            return
        if self._offer:
            self.headers += self._offer
            self._offer = []
        self._is_head_open = False
        self._stop_timer()
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle
        self.headers = []  # for trailers; the request has the other list

    def on_chunk_header(self) -> None:
        """Note that the body is chunked, so that trailers may follow."""
        self._is_chunked = True

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unheard_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        if self._is_offer_open:
            return
        if len(self.headers) > self.settings.max_header_lines:  # trailers
            self._stop(self._too_long())
        self._unheard_bytes = 0
        self._is_parser_used_up, self._is_chunked = self._is_chunked, False
        self._stop_timer()
        super().on_message_complete()
        self.cycle.more_body = False  # also where the answer is complete already

    def on_response_complete(self) -> None:
        """Go on to the next request, or read for a while what is left of one that was answered early."""
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self.cycle.body = bytearray()
            self._stop_timer()
            self._start_timer()

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _stop(self, refusal: Refusal) -> None:
        """End the parsing: httptools turns what is raised in a callback into an HttpParserError."""
        self._fault = refusal
        raise _StoppedError

    # --- time ---------------------------------------------------------------------------------------

    def _start_timer(self) -> None:
        is_upload = self.cycle is not None and not self.cycle.response_complete and not self._is_head_open
        wait_s = self.settings.upload_timeout_s if is_upload else self.settings.head_timeout_s
        self._timer = self.loop.call_later(wait_s, self._be_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _be_late(self) -> None:
        self._timer = None
        cycle = self.cycle
        if self._is_refused or (cycle is not None and cycle.response_complete and cycle.more_body):
            self.transport.close()
        elif cycle is not None and not cycle.response_complete:
            if self._is_head_open or self.pipeline:
                self._start_timer()  # a request behind one that is being answered
            else:
                self._refuse(_too_slow(self.settings.upload_timeout_s))
        elif self._is_head_open or self._unheard_bytes:
            self._refuse(_late(self.settings.head_timeout_s))
        else:
            self.transport.close()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _give_up_sending(self) -> None:
        self.refusals.note(_unread(self.settings.send_timeout_s), self.client)
        self.transport.abort()

    # --- refusing -----------------------------------------------------------------------------------

    def _too_long(self) -> Refusal:
        return _too_long(
            self.settings, is_in_target=self._is_head_open and len(self.url) > self.settings.max_head_bytes // 2
        )

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with `refusal` if an answer can stand here, read no more, and close soon."""
        self.refusals.note(refusal, self.client)
        self._is_refused = True
        self._unheard_bytes = 0
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            is_of_cycle = cycle.more_body and not self._is_head_open
            if self.pipeline or not is_of_cycle or cycle.response_started:
                # Answers come first that this one must not cut in two.
                cycle.keep_alive = False
                if is_of_cycle:
                    self.transport.close()
                return
            cycle.disconnected = True  # the application hears that the client is gone, and writes nothing
            cycle.message_event.set()
        self.parser = self.headers = None  # type: ignore[assignment]  # as uvicorn does, to free them
        self.transport.write(whole_response(refusal))
        self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_S, self._be_late)


class _StoppedError(Exception):
    """The parsing ends here."""


def _too_long(settings: ProxySettings, *, is_in_target: bool) -> Refusal:
    status = HTTPStatus.REQUEST_URI_TOO_LONG if is_in_target else HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return Refusal(
        status,
        "head_too_long",
        f"The request's head has more than {settings.max_head_bytes} bytes (`max_head_bytes`) or "
        f"{settings.max_header_lines} lines (`max_header_lines`), the limits of this proxy. Send less.",
    )


def _late(head_timeout_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "head_timeout",
        f"The request's head did not arrive within {head_timeout_s:g} s (`head_timeout_s`). Send it again.",
    )


def _too_slow(upload_timeout_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "upload_timeout",
        f"The request's body did not arrive within {upload_timeout_s:g} s (`upload_timeout_s`). Send it again.",
    )


def _unread(send_timeout_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "send_timeout",
        f"The client took nothing of its answer for {send_timeout_s:g} s (`send_timeout_s`).",
    )


def _too_many(max_connections: int) -> Refusal:
    return Refusal(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "too_many_connections",
        f"This proxy serves {max_connections} connections at a time (`max_connections`). Try again later.",
        [(b"retry-after", b"1")],
    )
