"""The copies of a CUDA device on made-up streams: what is enqueued runs later, in any order that the events allow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tokencake_vllm import stream_copier
from tokencake_vllm.block_memory import block_views, new_rows, pin
from tokencake_vllm.copies import Job
from tokencake_vllm.stream_copier import StreamCopier, runs

BLOCKS, SLOTS, LAYERS = 8, 6, 3
aten = torch.ops.aten
WRITES = {aten.copy_.default, aten.index_select.out, aten.index_copy_.default, aten.index_fill_.int_Scalar}


class Stream:
    """A queue of what the device has yet to do."""

    def __init__(self, device: Any = None) -> None:
        self.todo: list[Callable[[], bool]] = []

    def enqueue(self, work: Callable[[], Any]) -> None:
        def run() -> bool:
            work()
            return True

        self.todo.append(run)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.todo.append(event.query)  # stays at the head until the event is reached

    def advance(self) -> None:
        if self.todo and self.todo[0]():
            self.todo.pop(0)

    def synchronize(self) -> None:
        while self.todo:
            self.advance()


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.is_reached = False

    def record(self, stream: Stream) -> None:
        stream.enqueue(lambda: setattr(self, "is_reached", True))

    def query(self) -> bool:
        return self.is_reached

    def elapsed_time(self, other: Event) -> float:
        assert self.is_reached
        assert other.is_reached
        return 2.0


class Device(TorchDispatchMode):
    """Stands for `torch.cuda`: inside, what writes to a tensor goes to the current stream."""

    Event = Event

    def __init__(self) -> None:
        super().__init__()
        self.compute = self.current = Stream()
        self.sides: list[Stream] = []
        self.fails_at: int | None = None

    def Stream(self, device: Any) -> Stream:  # noqa: N802  # torch's name
        self.sides.append(Stream())
        return self.sides[-1]

    def current_stream(self, device: Any) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
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


class Bench:
    """A device with three layers, each of them by itself, and one copier."""

    def __init__(self, *, checks: bool = False) -> None:
        self.device = Device()
        self.layers = {f"layer{n}": torch.full((BLOCKS, 2, 4, 8), -1.0) for n in range(LAYERS)}
        self.views = block_views(self.layers, BLOCKS)
        self.rows = new_rows(self.views, SLOTS, "cpu").zero_()
        self.copier = StreamCopier(self.views, self.rows, checks=checks, cuda=self.device)

    def compute(self, block: int, value: float) -> None:
        """A step that the device has been given and that writes a block later."""
        for number, layer in enumerate(self.layers.values()):
            self.device.compute.enqueue(lambda layer=layer, number=number: layer[block].fill_(value + number))

    def start(self, job: Job) -> None:
        with self.device:
            self.copier.start(job)

    def run(self) -> list[Any]:
        done: list[Any] = []
        streams = [self.device.compute, *self.device.sides]
        while any(stream.todo for stream in streams):
            for stream in streams:
                stream.advance()
            done += self.copier.finished()
        return done + self.copier.finished()

    def value(self, block: int) -> float:
        first = float(self.layers["layer0"][block].flatten()[0])
        for number, layer in enumerate(self.layers.values()):
            assert torch.all(layer[block] == first + number)
        return first


@pytest.fixture(autouse=True)
def small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_copier, "STAGING_BYTES", 3 * LAYERS * 2 * 4 * 8 * 4)


def test_a_store_reads_what_the_device_was_given_to_compute_before() -> None:
    bench = Bench()
    bench.compute(1, 10.0)
    bench.start(Job(1, "store", (1,), (0,)))
    for stream in bench.device.sides:  # the copy may not overtake
        for _ in range(20):
            stream.advance()
    assert bench.copier.finished() == []
    (done,) = bench.run()
    assert (done.ok, done.seconds) == (True, 0.002)
    bench.start(Job(2, "load", (5,), (0,)))
    bench.run()
    assert bench.value(5) == 10.0


def test_the_computation_waits_for_no_copy() -> None:
    bench = Bench()
    bench.start(Job(1, "store", (1,), (0,)))
    bench.compute(2, 7.0)
    bench.device.compute.synchronize()
    assert bench.value(2) == 7.0
    assert any(stream.todo for stream in bench.device.sides)


def test_a_load_is_told_only_when_all_of_it_is_there() -> None:
    bench = Bench(checks=True)
    for block in range(5):
        bench.compute(block, 10.0 * block)
    bench.start(Job(1, "store", (0, 1, 2, 3, 4), (5, 0, 1, 3, 2)))
    bench.run()
    bench.start(Job(2, "wipe", (0, 1, 2, 3, 4)))
    bench.run()
    bench.start(Job(3, "load", (4, 3, 2, 1, 0), (5, 0, 1, 3, 2)))
    bench.device.compute.synchronize()
    while not (done := bench.copier.finished()):
        assert any(stream.todo for stream in bench.device.sides)
        for stream in bench.device.sides:
            stream.advance()
    assert done[0].ok
    assert [bench.value(block) for block in range(5)] == [40.0, 30.0, 20.0, 10.0, 0.0]


def test_a_failed_copy_is_told_only_when_what_it_began_is_over() -> None:
    bench = Bench()
    bench.device.fails_at = 1
    bench.start(Job(1, "load", (1, 2), (0, 1)))
    assert bench.copier.finished() == []  # the first transfer still writes
    (done,) = bench.run()
    assert not done.ok
    bench.device.fails_at = None
    bench.start(Job(2, "store", (1,), (0,)))
    assert [done.ok for done in bench.run()] == [True]


def test_a_dead_device_fails_every_copy_and_nothing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def dead(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    bench.start(Job(1, "store", (1,), (0,)))
    monkeypatch.setattr(Event, "query", dead)
    assert [done.ok for done in bench.copier.finished()] == [False]
    monkeypatch.setattr(Event, "record", dead)
    bench.start(Job(2, "load", (1,), (0,)))
    assert [done.ok for done in bench.copier.finished()] == [False]


def test_a_block_that_changed_on_the_host_fails_its_checksum() -> None:
    bench = Bench(checks=True)
    bench.start(Job(1, "store", (1,), (2,)))
    bench.run()
    bench.rows[2] += 1
    bench.start(Job(2, "load", (3,), (2,)))
    assert [done.ok for done in bench.run()] == [False]


@pytest.mark.parametrize(
    ("slots", "expected"),
    [((), []), ((4,), [(0, 1)]), ((1, 2, 3, 7, 8, 0), [(0, 3), (3, 5), (5, 6)]), ((3, 2, 1), [(0, 1), (1, 2), (2, 3)])],
)
def test_neighbouring_slots_are_one_transfer(slots: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert list(runs(slots)) == expected


def test_memory_that_cannot_be_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cudart:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> int:  # noqa: N802  # CUDA's name
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    with pytest.raises(RuntimeError, match="cannot be pinned"):
        pin(torch.empty(4))


moves = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.integers(0, BLOCKS - 1)),
        st.tuples(st.just("store"), st.permutations(range(BLOCKS)), st.permutations(range(SLOTS)), st.integers(1, 5)),
        st.tuples(st.just("load"), st.permutations(range(BLOCKS)), st.permutations(range(SLOTS)), st.integers(1, 5)),
        st.tuples(st.just("advance"), st.integers(0, 2), st.integers(1, 30)),
    ),
    max_size=60,
)


@given(moves)
@settings(max_examples=100)
def test_with_pins_as_the_scheduler_holds_them_every_order_gives_the_same(trace: list[tuple[Any, ...]]) -> None:
    """The scheduler never touches a block or slot of a copy under way: then no order of the streams matters."""
    bench = Bench()
    blocks, slots = [-1.0] * BLOCKS, [-1.0] * SLOTS
    busy: dict[int, Job] = {}
    stored: set[int] = set()
    for number, (move, *arguments) in enumerate(trace):
        busy_blocks = {block for job in busy.values() for block in job.blocks}
        busy_slots = {slot for job in busy.values() for slot in job.slots}
        match move:
            case "compute" if arguments[0] not in busy_blocks:
                blocks[arguments[0]] = float(number)
                bench.compute(arguments[0], float(number))
            case "store" | "load":
                some = [block for block in arguments[0] if block not in busy_blocks]
                allowed = set(range(SLOTS)) if move == "store" else stored
                into = [slot for slot in arguments[1] if slot not in busy_slots and slot in allowed]
                count = min(arguments[2], len(some), len(into))
                if count:
                    job = Job(number, move, tuple(some[:count]), tuple(into[:count]))
                    bench.start(job)
                    busy[number] = job
            case "advance":
                stream = [bench.device.compute, *bench.device.sides][arguments[0]]
                for _ in range(arguments[1]):
                    stream.advance()
        for done in bench.copier.finished():
            _settle(busy.pop(done.job.id), blocks, slots, stored)
    for done in bench.run():
        _settle(busy.pop(done.job.id), blocks, slots, stored)
    assert not busy
    assert [bench.value(block) if value >= 0 else value for block, value in enumerate(blocks)] == blocks


def _settle(job: Job, blocks: list[float], slots: list[float], stored: set[int]) -> None:
    for block, slot in zip(job.blocks, job.slots, strict=True):
        if job.kind == "store":
            slots[slot] = blocks[block]
            stored.add(slot)
        else:
            blocks[block] = slots[slot]
