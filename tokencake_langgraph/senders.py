"""The event senders of the process.

There is one sender per target, shared by all models with that target. It exists as long as one of them, or a queued
event. Senders are flushed at exit and reset in a forked child.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import Final
from weakref import WeakValueDictionary

from tokencake_langgraph.sender import EventSender, EventTarget, SenderStats

EXIT_FLUSH_S: Final = 2.0

_senders: WeakValueDictionary[EventTarget, EventSender] = WeakValueDictionary()
_lock = threading.Lock()


def sender_for(target: EventTarget) -> EventSender:
    """The process's sender to `target`."""
    with _lock:
        sender = _senders.get(target)
        if sender is None:
            sender = EventSender(target)
            _senders[target] = sender
        return sender


def sole_sender() -> EventSender | None:
    """The sender, if there is exactly one: it receives the events about calls of an earlier process."""
    with _lock:
        senders = list(_senders.values())
    return senders[0] if len(senders) == 1 else None


def flush(timeout_s: float = 5.0) -> bool:
    """Wait until all events reported so far are delivered or dropped; False if that took longer than `timeout_s`.

    Blocks: in a coroutine use `await asyncio.to_thread(flush)`.
    """
    deadline_s = time.monotonic() + timeout_s
    flushed = [sender.flush(max(deadline_s - time.monotonic(), 0.0)) for sender in _all()]
    return all(flushed)


def stats() -> tuple[SenderStats, ...]:
    """Counts of the events, one entry per target."""
    return tuple(sender.stats() for sender in _all())


def _all() -> list[EventSender]:
    with _lock:
        return list(_senders.values())


def _flush_at_exit() -> None:
    for sender in _all():
        sender.close()
    flush(EXIT_FLUSH_S)


def _reset_after_fork() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held the lock
    _lock = threading.Lock()
    for sender in list(_senders.values()):
        sender.reset_after_fork()


atexit.register(_flush_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
