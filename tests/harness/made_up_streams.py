"""CUDA streams on a CPU: what is enqueued runs later, in any order that the events allow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WRITES = {aten.copy_.default, aten.index_select.out, aten.index_copy_.default, aten.index_fill_.int_Scalar}


class Stream:
    """A queue of what the device has yet to do."""

    def __init__(self, device: Any = None) -> None:
        self.todo: list[Callable[[], bool]] = []

    def enqueue(self, work: Callable[[], Any]) -> None:
        """`work` is done when everything before it is."""

        def run() -> bool:
            work()
            return True

        self.todo.append(run)

    def wait_event(self, event: Event) -> None:
        """Stand still until `event` is reached."""
        self.todo.append(lambda: event.is_reached)

    def advance(self) -> None:
        """Do the next piece of work, unless it waits for an event."""
        if self.todo and self.todo[0]():
            self.todo.pop(0)

    def synchronize(self) -> None:
        """Go on until nothing is left; so does what this stream waits for."""
        while self.todo:
            before = len(self.todo)
            self.advance()
            if len(self.todo) == before:
                for stream in Event.streams:
                    stream.advance()


class DeafStream(Stream):
    """A fault: it waits for no event."""

    def wait_event(self, event: Event) -> None:
        """Go on at once."""


class Event:
    """A place in a stream."""

    streams: ClassVar[list[Stream]] = []
    """All streams of the device, which goes on while the host waits."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.is_reached = False

    def record(self, stream: Stream) -> None:
        """Stand behind what `stream` was given so far."""
        stream.enqueue(lambda: setattr(self, "is_reached", True))

    def synchronize(self) -> None:
        """Let the device go on until the event is reached."""
        while not self.is_reached:
            for stream in self.streams:
                stream.advance()

    def query(self) -> bool:
        """Whether the device has reached it."""
        return self.is_reached

    def elapsed_time(self, other: Event) -> float:
        """Two milliseconds.

        Raises:
            RuntimeError: one of the two events is not reached.
        """
        if not (self.is_reached and other.is_reached):
            raise RuntimeError("an event is not reached yet")
        return 2.0


class EarlyEvent(Event):
    """A fault: it says at once that it is reached."""

    def query(self) -> bool:
        """Always."""
        return True

    def elapsed_time(self, other: Event) -> float:
        """Two milliseconds."""
        return 2.0


class Device(TorchDispatchMode):
    """Stands for `torch.cuda`: inside, what writes to a tensor goes to the current stream."""

    def __init__(self, stream: type[Stream] = Stream, event: type[Event] = Event) -> None:
        super().__init__()
        self.Event = event
        self.compute = self.current = Stream()
        self.sides: list[Stream] = []
        self.fails_at: int | None = None
        """The write that raises, counted from 0."""
        self._kind = stream
        Event.streams = [self.compute]

    def Stream(self, device: Any) -> Stream:  # noqa: N802  # torch's name
        """A new side stream."""
        self.sides.append(self._kind(device))
        Event.streams.append(self.sides[-1])
        return self.sides[-1]

    def current_stream(self, device: Any) -> Stream:
        """The stream that work is enqueued on."""
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Work inside is enqueued on `stream`."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in WRITES or self.current is self.compute:
            return function(*args, **(kwargs or {}))
        if self.fails_at is not None:
            self.fails_at -= 1
            if self.fails_at < 0:
                raise RuntimeError("made up")
        self.current.enqueue(lambda: function(*args, **(kwargs or {})))
        return kwargs["out"] if kwargs else args[0]
