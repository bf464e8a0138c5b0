"""How do events reach the engine without anybody waiting for them?

A bounded queue and one daemon thread per target. Whoever puts an event never blocks and never sees an error: what
cannot be delivered is dropped and counted. An engine without the endpoint is left alone for a while.
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
Delivery: TypeAlias = Literal["taken", "absent", "unauthorized", "refused", "away"]

MAX_QUEUED: Final = 10_000
MAX_BATCH: Final = 256
COLLECT_S: Final = 0.005
"""After the first event of a batch: parallel tools start within milliseconds of each other."""
INTERVAL_S: Final = 0.05
"""Between two posts. An event that comes alone goes at once; a busy process sends larger batches, not more of them."""
RETRY_DELAYS_S: Final = (0.1, 0.5)
OFF_S: Final = 60.0
"""Nothing is sent for so long to a target that lacks the endpoint or refuses the key."""
AWAY_S: Final = 5.0
"""The same for a target that could not be reached in all retries."""
IDLE_S: Final = 30.0
"""The thread ends when nothing was to be sent for so long; the next event starts another."""

_TIMEOUT: Final = httpx.Timeout(5.0, connect=2.0)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model's events go and with which credentials. Equal targets share one sender."""

    url: str
    api_key: ApiKey = field(default=None, repr=False, hash=False)
    """Not hashed, because a callable need not be hashable."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    proxy: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SenderStats:
    """What became of the events for one target since the process started."""

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
        target: where to.
        transport: replaces the network, in tests.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        target: Target,
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
        self._told: set[Delivery] = set()
        self.forget_thread()

    def forget_thread(self) -> None:
        """Start afresh in a forked child: thread and queue stayed with the parent, which will deliver them."""
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
        """No more waiting between retries: the process ends."""
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
            logger.exception("Events for %s are not sent for %g s.", self.target.url, OFF_S)
            # A dead thread must not leave a queue that nobody empties.
            with self._changed:
                self._thread = None
                self._pause(OFF_S)

    def _next_batch(self) -> list[tuple[Event, float]]:
        """Wait for events; empty when the thread is to end."""
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
            if delivery != "away":
                break
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, delay_s)
            delivery = self._post(client, batch)
        self._tell(delivery)
        with self._changed:
            if delivery == "taken":
                self._sent += len(batch)
            else:
                self._dropped += len(batch)
            if delivery in ("absent", "unauthorized"):
                self._pause(OFF_S)
            elif delivery == "away":
                self._pause(AWAY_S)
            self._in_flight = 0
            self._changed.notify_all()

    def _post(self, client: httpx.Client, batch: list[tuple[Event, float]]) -> Delivery:
        self._posted_s = time.monotonic()
        try:
            answer = client.post(self.target.url, content=self._body(batch), headers=self._headers())
        except Exception as error:  # noqa: BLE001 - the user's key callable may raise anything
            logger.debug("Events for %s: %r", self.target.url, error)
            self._failed_posts += 1
            return "away"
        delivery = _delivery(answer.status_code)
        if delivery != "taken":
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

    def _tell(self, delivery: Delivery) -> None:
        """Say each kind of trouble once; a delivery makes it new again."""
        if delivery == "taken":
            self._told.clear()
            return
        if delivery in self._told:
            return
        self._told.add(delivery)
        url = self.target.url
        match delivery:
            case "absent":
                logger.info("%s does not exist: the engine runs without TokenCake, events stay here.", url)
            case "unauthorized":
                logger.warning("%s refuses the API key: events are dropped. Pass `api_key=` to ChatTokencake.", url)
            case "refused":
                logger.warning("%s refuses the events: do client and engine have the same version?", url)
            case "away":
                logger.warning("%s cannot be reached: events are dropped until it can, calls are not affected.", url)

    def _pause(self, pause_s: float) -> None:
        self._off_until_s = self._clock() + pause_s
        self._drop_queue()
        self._in_flight = 0
        self._changed.notify_all()

    def _drop_queue(self) -> None:
        self._dropped += len(self._queue)
        self._queue.clear()


def _delivery(status: int) -> Delivery:
    if httpx.codes.is_success(status):
        return "taken"
    if status in (401, 403):
        return "unauthorized"
    if status in (404, 405, 501) or httpx.codes.is_redirect(status):
        return "absent"
    if status in (408, 425, 429) or httpx.codes.is_server_error(status):
        return "away"
    return "refused"


def _resolve(api_key: ApiKey) -> str | None:
    """The key's text; a callable is asked for every batch, in the sender's thread."""
    if api_key is None or isinstance(api_key, SecretStr):
        return api_key.get_secret_value() if api_key else None
    key: Any = api_key()
    if not inspect.isawaitable(key):
        return str(key)

    async def fetch() -> str:
        return str(await key)

    return asyncio.run(fetch())
