"""Which senders does this process have, and how does it empty them?

One per target, shared by all models that have it and alive as long as one of them or something queued; emptied at
exit, started afresh in a forked child.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import Final
from weakref import WeakValueDictionary

from tokencake_langgraph.sender import EventSender, SenderStats, Target

EXIT_FLUSH_S: Final = 2.0

_senders: WeakValueDictionary[Target, EventSender] = WeakValueDictionary()
_lock = threading.Lock()


def sender_for(target: Target) -> EventSender:
    """The process's sender to `target`."""
    with _lock:
        sender = _senders.get(target)
        if sender is None:
            sender = EventSender(target)
            _senders[target] = sender
        return sender


def sole_sender() -> EventSender | None:
    """The only sender there is: where events go that belong to a call of an earlier process."""
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
    """What became of the events, one entry per target."""
    return tuple(sender.stats() for sender in _all())


def _all() -> list[EventSender]:
    with _lock:
        return list(_senders.values())


def _flush_at_exit() -> None:
    for sender in _all():
        sender.close()
    flush(EXIT_FLUSH_S)


def _start_afresh_in_child() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it
    _lock = threading.Lock()
    for sender in list(_senders.values()):
        sender.forget_thread()


atexit.register(_flush_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_in_child)
