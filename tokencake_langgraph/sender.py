"""The background sender of events to an engine.

Each target has a bounded queue and one daemon thread. `put` never blocks and never raises: events that cannot be
delivered are dropped and counted. After a permanent error the sender pauses.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import httpx
from pydantic import SecretStr

from tokencake.protocol import EVENTS_PATH, MAX_AGO_S, VERSION, Event, to_wire

ApiKey: TypeAlias = SecretStr | Callable[[], str] | Callable[[], Awaitable[str]] | None
DeliveryResult: TypeAlias = Literal["accepted", "no_endpoint", "unauthorized", "rejected", "unreachable"]

MAX_QUEUED: Final = 10_000
MAX_BATCH: Final = 256
COLLECT_S: Final = 0.005
"""Wait after the first event of a batch, because parallel tools start within milliseconds of each other."""
INTERVAL_S: Final = 0.05
"""Least time between two posts. A single event is sent at once; a busy process sends larger batches, not more."""
RETRY_DELAYS_S: Final = (0.1, 0.5)
REJECTED_PAUSE_S: Final = 60.0
"""Pause after the target lacked the endpoint or rejected the API key."""
UNREACHABLE_PAUSE_S: Final = 5.0
"""Pause after the target could not be reached in any retry."""
IDLE_S: Final = 30.0
"""The thread ends after this time without an event; the next event starts another thread."""

_TIMEOUT: Final = httpx.Timeout(5.0, connect=2.0)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EventTarget:
    """URL and credentials for the events of a model. Equal targets share one sender."""

    url: str
    api_key: ApiKey = field(default=None, repr=False, hash=False)
    """Not hashed, because a callable need not be hashable."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    proxy: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SenderStats:
    """Counts of the events for one target since the process started."""

    url: str
    sent: int
    dropped: int
    failed_posts: int
    queued: int
    is_off: bool


def events_url(base_url: str) -> str:
    """The events endpoint beside the OpenAI API at `base_url`."""
    return base_url.rstrip("/").removesuffix("/v1") + EVENTS_PATH


class EventSender:
    """Delivers events to one target.

    Args:
        target: the receiver.
        transport: replaces the network in tests.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        target: EventTarget,
        *,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_queued: int = MAX_QUEUED,
        retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S,
    ) -> None:
        self.target = target
        self._transport = transport
        self._clock = clock
        self._max_queued = max_queued
        self._retry_delays_s = retry_delays_s
        self._sent = self._dropped = self._failed_posts = 0
        self._off_until_s = 0.0
        self._posted_s = -INTERVAL_S
        self._logged: set[DeliveryResult] = set()
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Reset the thread and the queue in a forked child; the parent keeps both and delivers its events."""
        self._changed = threading.Condition()
        self._queue: deque[tuple[Event, float]] = deque()
        self._in_flight = 0
        self._flushes = 0
        self._is_closing = False
        self._is_idle = False
        self._thread: threading.Thread | None = None

    def put(self, event: Event) -> None:
        """Queue an event that happens now; the oldest makes room."""
        now_s = self._clock()
        with self._changed:
            if now_s < self._off_until_s:
                self._dropped += 1
                return
            if len(self._queue) >= self._max_queued:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append((event, now_s))
            if self._thread is None:
                self._start()
            elif self._is_idle or len(self._queue) == MAX_BATCH:
                self._is_idle = False
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every queued event is delivered or dropped; False if that took longer than `timeout_s`."""
        with self._changed:
            self._flushes += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._queue and not self._in_flight, timeout_s)
            finally:
                self._flushes -= 1

    def close(self) -> None:
        """Stop waiting between retries, because the process ends."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def stats(self) -> SenderStats:
        """A snapshot."""
        with self._changed:
            queued = len(self._queue) + self._in_flight
            is_off = self._clock() < self._off_until_s
            return SenderStats(self.target.url, self._sent, self._dropped, self._failed_posts, queued, is_off)

    # --- the thread -------------------------------------------------------------------------------

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="tokencake-events", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter shuts down
            self._drop_queue()
        else:
            self._thread = thread

    def _run(self) -> None:
        try:
            with httpx.Client(timeout=_TIMEOUT, transport=self._transport, proxy=self.target.proxy) as client:
                while batch := self._next_batch():
                    self._deliver(client, batch)
        except Exception:
            logger.exception("Events for %s are not sent for %g s.", self.target.url, REJECTED_PAUSE_S)
            # Without a thread the queue would never be emptied.
            with self._changed:
                self._thread = None
                self._pause(REJECTED_PAUSE_S)

    def _next_batch(self) -> list[tuple[Event, float]]:
        """Wait for events; empty if the thread is to end."""
        with self._changed:
            self._is_idle = True
            if not self._changed.wait_for(lambda: self._queue, IDLE_S):
                self._thread = None
                return []
            self._is_idle = False
            since_post_s = time.monotonic() - self._posted_s
            self._changed.wait_for(self._is_urgent, max(INTERVAL_S - since_post_s, COLLECT_S))
            batch = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
            self._in_flight = len(batch)
            return batch

    def _is_urgent(self) -> bool:
        return len(self._queue) >= MAX_BATCH or self._flushes > 0 or self._is_closing

    def _deliver(self, client: httpx.Client, batch: list[tuple[Event, float]]) -> None:
        delivery = self._post(client, batch)
        for delay_s in self._retry_delays_s:
            if delivery != "unreachable":
                break
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, delay_s)
            delivery = self._post(client, batch)
        self._log_once(delivery)
        with self._changed:
            if delivery == "accepted":
                self._sent += len(batch)
            else:
                self._dropped += len(batch)
            if delivery in ("no_endpoint", "unauthorized"):
                self._pause(REJECTED_PAUSE_S)
            elif delivery == "unreachable":
                self._pause(UNREACHABLE_PAUSE_S)
            self._in_flight = 0
            self._changed.notify_all()

    def _post(self, client: httpx.Client, batch: list[tuple[Event, float]]) -> DeliveryResult:
        self._posted_s = time.monotonic()
        try:
            answer = client.post(self.target.url, content=self._body(batch), headers=self._headers())
        except Exception as error:  # noqa: BLE001 - the user's key callable may raise anything
            logger.debug("Events for %s: %r", self.target.url, error)
            self._failed_posts += 1
            return "unreachable"
        delivery = _delivery(answer.status_code)
        if delivery != "accepted":
            self._failed_posts += 1
        return delivery

    def _body(self, batch: list[tuple[Event, float]]) -> bytes:
        now_s = self._clock()
        events = []
        for event, happened_s in batch:
            wire = to_wire(event)
            if "ago_s" in wire:
                wire["ago_s"] = round(min(max(now_s - happened_s, 0.0), MAX_AGO_S), 6)
            events.append(wire)
        return json.dumps({"v": VERSION, "events": events}, separators=(",", ":")).encode()

    def _headers(self) -> httpx.Headers:
        headers = httpx.Headers({"Content-Type": "application/json"})
        if key := _resolve(self.target.api_key):
            headers["Authorization"] = f"Bearer {key}"
        headers.update(dict(self.target.headers))
        return headers

    def _log_once(self, delivery: DeliveryResult) -> None:
        """Log each kind of failure once, until the next successful delivery."""
        if delivery == "accepted":
            self._logged.clear()
            return
        if delivery in self._logged:
            return
        self._logged.add(delivery)
        url = self.target.url
        match delivery:
            case "no_endpoint":
                logger.info("%s does not exist: the engine runs without TokenCake, so events are dropped.", url)
            case "unauthorized":
                logger.warning("%s rejects the API key: events are dropped. Pass `api_key=` to ChatTokencake.", url)
            case "rejected":
                logger.warning("%s rejects the events. Check that client and engine have the same version.", url)
            case "unreachable":
                logger.warning(
                    "%s cannot be reached: events are dropped until it can be reached; calls are not affected.", url
                )

    def _pause(self, pause_s: float) -> None:
        self._off_until_s = self._clock() + pause_s
        self._drop_queue()
        self._in_flight = 0
        self._changed.notify_all()

    def _drop_queue(self) -> None:
        self._dropped += len(self._queue)
        self._queue.clear()


def _delivery(status: int) -> DeliveryResult:
    if httpx.codes.is_success(status):
        return "accepted"
    if status in (401, 403):
        return "unauthorized"
    if status in (404, 405, 501) or httpx.codes.is_redirect(status):
        return "no_endpoint"
    if status in (408, 425, 429) or httpx.codes.is_server_error(status):
        return "unreachable"
    return "rejected"


def _resolve(api_key: ApiKey) -> str | None:
    """The text of the key. A callable is called for each batch, in the sender's thread."""
    if api_key is None or isinstance(api_key, SecretStr):
        return api_key.get_secret_value() if api_key else None
    key: Any = api_key()
    if not inspect.isawaitable(key):
        return str(key)

    async def fetch() -> str:
        return str(await key)

    return asyncio.run(fetch())
