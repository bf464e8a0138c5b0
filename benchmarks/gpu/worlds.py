"""Devices that the copies run on: a CUDA device, or made-up streams on a CPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, Protocol, TypeAlias

import torch

from tests.harness.made_up_streams import DeafStream, Device, EarlyEvent, Event, Stream

Fault: TypeAlias = Literal["waits for nothing", "ends at once"] | None
"""What is wrong with the streams or events of a negative control."""


class World(Protocol):
    """A device with a compute stream; `draw` decides what is left to chance."""

    is_real: bool
    device: torch.device
    cuda: Any
    """What the copier takes for `torch.cuda`."""
    copier_options: dict[str, Any]
    draw: random.Random

    def compute(self, work: Callable[[], object]) -> None:
        """`work` on the compute stream, which takes some milliseconds to reach it."""

    def start(self, copier: Any, job: Any) -> None:
        """Give the copier a job."""

    def run_ahead(self) -> None:
        """The copies go on as far as they may, while the computation stands still."""

    def rest(self) -> None:
        """The device goes on for a moment."""

    def settle(self) -> None:
        """The device does all it was given."""


class Gpu:
    """A CUDA device; the computation has a stream of its own, as in vLLM."""

    is_real = True

    def __init__(self, draw: random.Random, fault: Fault = None) -> None:
        self.device = torch.device("cuda:0")
        self.draw = draw
        self.copier_options: dict[str, Any] = {}
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]  # torch's

        class Deaf(torch.cuda.Stream):
            def wait_event(self, event: Any) -> None:
                """Go on at once."""

        class Early(torch.cuda.Event):
            def query(self) -> bool:
                """Always."""
                return True

            def elapsed_time(self, end_event: Any) -> float:  # noqa: ARG002  # torch's
                """Some time."""
                return 1.0

        self.cuda: Any = SimpleNamespace(
            Stream=Deaf if fault == "waits for nothing" else torch.cuda.Stream,
            Event=Early if fault == "ends at once" else torch.cuda.Event,
            current_stream=torch.cuda.current_stream,
            stream=torch.cuda.stream,
        )

    def compute(self, work: Callable[[], object]) -> None:
        """About 8 ms later."""
        cuda: Any = torch.cuda
        cuda._sleep(14_000_000)  # noqa: SLF001  # cycles; torch's own tests use it
        work()

    def start(self, copier: Any, job: Any) -> None:
        """The copier's own threads submit it."""
        copier.start(job)

    def run_ahead(self) -> None:
        """They do anyway."""

    def rest(self) -> None:
        """50 us."""
        time.sleep(0.00005)

    def settle(self) -> None:
        """All streams."""
        torch.cuda.synchronize()


class Paper:
    """Made-up streams: which of them goes on next is left to chance."""

    is_real = False

    def __init__(self, draw: random.Random, fault: Fault = None) -> None:
        self.device = torch.device("cpu")
        self.draw = draw
        self.copier_options: dict[str, Any] = {"spawn": lambda work: None}  # noqa: ARG005  # the copier's
        self.cuda: Any = Device(
            DeafStream if fault == "waits for nothing" else Stream, EarlyEvent if fault == "ends at once" else Event
        )

    def compute(self, work: Callable[[], object]) -> None:
        """Whenever its turn comes."""
        self.cuda.compute.enqueue(work)

    def start(self, copier: Any, job: Any) -> None:
        """Submit all of it."""
        with self.cuda:
            copier.start(job)
            while copier.advance():
                pass

    def run_ahead(self) -> None:
        """Until every side stream waits or is empty."""
        for stream in self.cuda.sides:
            for _ in range(50):
                stream.advance()

    def rest(self) -> None:
        """One piece of work of one stream."""
        self.draw.choice([self.cuda.compute, *self.cuda.sides]).advance()

    def settle(self) -> None:
        """In an order that is left to chance."""
        while any(stream.todo for stream in (self.cuda.compute, *self.cuda.sides)):
            self.rest()
