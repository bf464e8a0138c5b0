"""The copies of a CUDA device on made-up streams."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.made_up_streams import Device, Event, Stream
from tokencake_vllm.transfer import block_memory, copy_lane, slot_transfers, stream_copier
from tokencake_vllm.transfer.block_memory import block_views, new_rows, pin
from tokencake_vllm.transfer.checksums import Checksums
from tokencake_vllm.transfer.jobs import TransferJob
from tokencake_vllm.transfer.slot_transfers import DriverTransfers, TorchTransfers, runs
from tokencake_vllm.transfer.stream_copier import StreamCopier

BLOCKS, SLOTS, LAYERS = 8, 6, 3


class Immediate:
    """A device whose streams do everything at once."""

    class Event(Event):
        def record(self, stream: Any) -> None:
            self.is_reached = True

    def Stream(self, device: Any) -> Stream:  # noqa: N802  # torch's name
        return Stream()

    def current_stream(self, device: Any) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class CopierHarness:
    """A device with three layers, each of them by itself, and one copier."""

    def __init__(self, *, every: int = 0) -> None:
        self.device = Device()
        self.layers = {f"layer{n}": torch.full((BLOCKS, 2, 4, 8), -1.0) for n in range(LAYERS)}
        self.views = block_views(self.layers, BLOCKS)
        self.rows = new_rows(self.views, SLOTS, "cpu").zero_()
        self.copier = StreamCopier(
            self.views, self.rows, checksums=Checksums(every, SLOTS), cuda=self.device, spawn=lambda _: None
        )

    def compute(self, block: int, value: float) -> None:
        """A step that the device has been given and that writes a block later."""
        for number, layer in enumerate(self.layers.values()):
            self.device.compute.enqueue(lambda layer=layer, number=number: layer[block].fill_(value + number))

    def queue(self, job: TransferJob) -> None:
        with self.device:
            self.copier.start(job)

    def submit(self) -> bool:
        """A piece of each direction, as the copier's threads do it."""
        with self.device:
            return self.copier.advance()

    def start(self, job: TransferJob) -> None:
        self.queue(job)
        while self.submit():
            pass

    def run(self) -> list[Any]:
        done: list[Any] = []
        streams = [self.device.compute, *self.device.sides]
        while self.submit() or any(stream.todo for stream in streams):
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
    monkeypatch.setattr(copy_lane, "STAGING_BYTES", 3 * LAYERS * 2 * 4 * 8 * 4)


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[None]:
    before_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before_s)


def test_a_store_reads_what_the_device_was_given_to_compute_before() -> None:
    harness = CopierHarness()
    harness.compute(1, 10.0)
    harness.start(TransferJob(1, "store", (1,), (0,)))
    for stream in harness.device.sides:  # the copy may not overtake
        for _ in range(20):
            stream.advance()
    assert harness.copier.finished() == []
    (done,) = harness.run()
    assert (done.ok, done.seconds) == (True, 0.002)
    harness.start(TransferJob(2, "load", (5,), (0,)))
    harness.run()
    assert harness.value(5) == 10.0


def test_the_computation_waits_for_no_copy() -> None:
    harness = CopierHarness()
    harness.start(TransferJob(1, "store", (1,), (0,)))
    harness.compute(2, 7.0)
    harness.device.compute.synchronize()
    assert harness.value(2) == 7.0
    assert any(stream.todo for stream in harness.device.sides)


def test_a_load_is_told_only_when_all_of_it_is_there() -> None:
    harness = CopierHarness(every=1)
    for block in range(5):
        harness.compute(block, 10.0 * block)
    harness.start(TransferJob(1, "store", (0, 1, 2, 3, 4), (5, 0, 1, 3, 2)))
    harness.run()
    harness.start(TransferJob(2, "wipe", (0, 1, 2, 3, 4)))
    harness.run()
    harness.start(TransferJob(3, "load", (4, 3, 2, 1, 0), (5, 0, 1, 3, 2)))
    harness.device.compute.synchronize()
    while not (done := harness.copier.finished()):
        assert any(stream.todo for stream in harness.device.sides)
        for stream in harness.device.sides:
            stream.advance()
    assert done[0].ok
    assert [harness.value(block) for block in range(5)] == [40.0, 30.0, 20.0, 10.0, 0.0]


def test_a_failed_copy_is_told_only_when_what_it_began_is_over() -> None:
    harness = CopierHarness()
    harness.device.fails_at = 1
    harness.start(TransferJob(1, "load", (1, 2), (0, 1)))
    assert harness.copier.finished() == []  # the first transfer still writes
    (done,) = harness.run()
    assert not done.ok
    harness.device.fails_at = None
    harness.start(TransferJob(2, "store", (1,), (0,)))
    assert [done.ok for done in harness.run()] == [True]


def test_before_the_device_s_memory_goes_every_copy_has_ended() -> None:
    harness = CopierHarness()
    harness.compute(1, 10.0)
    harness.start(TransferJob(1, "store", (1,), (0,)))
    harness.start(TransferJob(2, "load", (2,), (3,)))
    harness.copier.drain()
    assert not any(stream.todo for stream in harness.device.sides)
    assert [(done.job.id, done.ok) for done in harness.copier.finished()] == [(1, True), (2, True)]
    harness.copier.drain()  # twice is once


def test_what_is_queued_is_submitted_before_the_device_s_memory_goes() -> None:
    views = block_views({"layer": torch.zeros(BLOCKS, 2, 4, 8)}, BLOCKS)
    copier = StreamCopier(views, new_rows(views, SLOTS, "cpu").zero_(), checksums=Checksums(0, SLOTS), cuda=Immediate())
    for number in range(50):
        copier.start(TransferJob(number, "load", (0, 1, 2, 3), (0, 1, 2, 3)))
    copier.drain()
    assert len(copier.finished()) == 50
    copier.close()


def test_a_dead_device_fails_every_copy_and_nothing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = CopierHarness()

    def dead(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    harness.start(TransferJob(1, "store", (1,), (0,)))
    monkeypatch.setattr(Event, "query", dead)
    assert [done.ok for done in harness.copier.finished()] == [False]
    monkeypatch.setattr(Event, "record", dead)
    harness.start(TransferJob(2, "load", (1,), (0,)))
    assert [done.ok for done in harness.copier.finished()] == [False]


def test_a_block_that_changed_on_the_host_fails_its_checksum() -> None:
    harness = CopierHarness(every=1)
    harness.start(TransferJob(1, "store", (1,), (2,)))
    harness.run()
    harness.rows[2] += 1
    harness.start(TransferJob(2, "load", (3,), (2,)))
    assert [done.ok for done in harness.run()] == [False]


@pytest.mark.parametrize(
    ("slots", "expected"),
    [((), []), ((4,), [(0, 1)]), ((1, 2, 3, 7, 8, 0), [(0, 3), (3, 5), (5, 6)]), ((3, 2, 1), [(0, 1), (1, 2), (2, 3)])],
)
def test_neighbouring_slots_are_one_transfer(slots: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert list(runs(slots, longest=3)) == expected


def test_a_long_run_of_slots_is_cut_into_transfers_that_let_others_through() -> None:
    assert list(runs(range(7), longest=3)) == [(0, 3), (3, 6), (6, 7)]


class Driver:
    """Copies host memory at once, as the CUDA driver would later; with an `error` it copies nothing."""

    def __init__(self, error: int = 0) -> None:
        self.sizes: list[int] = []
        self.error = error

    @property
    def cuMemcpyAsync(self) -> Any:  # noqa: N802  # CUDA's name
        def copy(to: int, from_: int, size: int, stream: int) -> int:
            if not self.error:
                self.sizes.append(size)
                ctypes.memmove(to, from_, size)
            return self.error

        return copy


@pytest.mark.parametrize("kind", ["driver", "torch"])
def test_staging_rows_reach_their_slots_and_come_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_transfers, "TRANSFER_BYTES", 2 * 3 * 8)
    rows, driver = torch.zeros((6, 3), dtype=torch.int64), Driver()
    transfers = DriverTransfers(rows, driver) if kind == "driver" else TorchTransfers(rows)
    stream = SimpleNamespace(cuda_stream=0)
    staging = torch.arange(15).reshape(5, 3)
    transfers.to_slots(staging, (1, 2, 3, 5, 0), stream)
    assert torch.equal(rows[[1, 2, 3, 5, 0]], staging)
    assert torch.equal(rows[4], torch.zeros(3, dtype=torch.int64))
    back = torch.zeros_like(staging)
    transfers.from_slots(back, (0, 1, 2, 3, 5), stream)
    assert torch.equal(back, staging[[4, 0, 1, 2, 3]])
    if kind == "driver":
        assert driver.sizes[:4] == [48, 24, 24, 24]


def test_a_slot_out_of_range_is_refused_before_the_driver_hears_of_it() -> None:
    rows, driver = torch.zeros((6, 3)), Driver()
    for slots in [(6,), (-1,), (1, 2, 3)]:
        with pytest.raises(IndexError, match="of 6"):
            DriverTransfers(rows, driver).to_slots(torch.zeros((2, 3)), slots, SimpleNamespace(cuda_stream=0))
    assert driver.sizes == []


def test_an_error_of_the_driver_fails_the_transfer() -> None:
    transfers = DriverTransfers(torch.zeros((6, 3)), Driver(error=700))
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        transfers.to_slots(torch.zeros((2, 3)), (1,), SimpleNamespace(cuda_stream=0))


def test_a_load_that_a_request_waits_for_passes_uploads_started_before_it() -> None:
    harness = CopierHarness()
    harness.start(TransferJob(1, "store", (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)))
    harness.run()
    harness.queue(TransferJob(2, "load", (0, 1, 2), (0, 1, 2)))
    harness.queue(TransferJob(3, "load", (3, 4), (3, 4)))
    harness.queue(TransferJob(4, "load", (5,), (5,), "a request"))
    harness.copier.pace(is_computing=True, urgent=(3,))
    assert [done.job.id for done in harness.run()] == [3, 4, 2]


def test_a_job_is_submitted_in_pieces_and_told_once_behind_the_last() -> None:
    harness = CopierHarness()
    harness.queue(TransferJob(1, "store", (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)))
    harness.submit()
    for stream in harness.device.sides:
        stream.synchronize()
    assert harness.copier.finished() == []  # the second piece is not submitted yet
    assert [done.job.id for done in harness.run()] == [1]


def test_no_more_pieces_are_under_way_than_the_ring_of_ids_has_rows() -> None:
    harness = CopierHarness()
    for number in range(20):
        harness.queue(TransferJob(number, "load", (0,), (0,)))
    with harness.device:
        while harness.copier.advance():
            for half in harness.copier._lanes["load"].halves:
                assert len(half._ends) <= copy_lane.DEPTH
    assert sorted(done.job.id for done in harness.run()) == list(range(20))


def test_a_copier_that_is_closed_leaves_the_rest_undone() -> None:
    harness = CopierHarness()
    harness.queue(TransferJob(1, "store", (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)))
    harness.submit()
    harness.copier.close()
    assert not any(stream.todo for stream in harness.device.sides)
    assert harness.copier.finished() == []


def test_the_threads_submit_by_themselves_and_end_with_the_copier() -> None:
    harness = CopierHarness()
    copier = StreamCopier(harness.views, harness.rows, checksums=Checksums(0, SLOTS), cuda=Immediate())
    copier.start(TransferJob(1, "store", (1, 2), (3, 4)))
    until = time.monotonic() + 60
    while not (done := copier.finished()):
        assert time.monotonic() < until
        time.sleep(0.001)
    assert done[0].ok
    assert torch.equal(harness.rows[3], torch.full_like(harness.rows[3], int(harness.views[0][1].flatten()[0])))
    copier.close()
    assert not any(thread is not None and thread.is_alive() for thread in copier._threads)


def test_while_there_are_copies_a_busy_thread_lets_theirs_go_on_sooner() -> None:
    before_s = sys.getswitchinterval()
    harness = CopierHarness()
    assert sys.getswitchinterval() <= stream_copier.SWITCH_S < before_s
    harness.copier.close()
    assert sys.getswitchinterval() == before_s


class Cudart:
    """Registers memory until `fails_at` calls were made."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.registered = fails_at, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802  # CUDA's name
        if len(self.registered) == self.fails_at:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802  # CUDA's name
        del self.registered[address]
        return 0


def test_memory_is_pinned_in_parts_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(fails_at=9)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(block_memory, "PIN_BYTES", 100)
    rows = torch.empty((5, 10), dtype=torch.int32)  # 40 bytes a row
    pin(rows, "cpu")
    assert list(cudart.registered.values()) == [80, 80, 40]
    assert min(cudart.registered) == rows.data_ptr()


def test_memory_that_cannot_be_pinned_is_refused_and_nothing_stays_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(fails_at=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(block_memory, "PIN_BYTES", 100)
    launched: list[Any] = []
    monkeypatch.setattr(torch, "ones", lambda *_, **where: launched.append(where["device"]) or torch.zeros(1))
    with pytest.raises(RuntimeError, match="200 bytes of host memory cannot be pinned: CUDA error 2"):
        pin(torch.empty((5, 10), dtype=torch.int32), "cpu")
    assert cudart.registered == {}
    assert launched == ["cpu"]  # takes the error that CUDA holds ready for the next launch


moves = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.integers(0, BLOCKS - 1)),
        st.tuples(st.just("store"), st.permutations(range(BLOCKS)), st.permutations(range(SLOTS)), st.integers(1, 5)),
        st.tuples(st.just("load"), st.permutations(range(BLOCKS)), st.permutations(range(SLOTS)), st.integers(1, 5)),
        st.tuples(st.just("advance"), st.integers(0, 4), st.integers(1, 30)),
        st.tuples(st.just("submit"), st.integers(1, 3)),
    ),
    max_size=60,
)


@given(moves)
@settings(max_examples=100)
def test_with_pins_as_the_scheduler_holds_them_every_order_gives_the_same(trace: list[tuple[Any, ...]]) -> None:
    """The scheduler never touches a block or slot of a copy under way: then no order of the streams matters."""
    harness = CopierHarness()
    blocks, slots = [-1.0] * BLOCKS, [-1.0] * SLOTS
    busy: dict[int, TransferJob] = {}
    stored: set[int] = set()
    for number, (move, *arguments) in enumerate(trace):
        busy_blocks = {block for job in busy.values() for block in job.blocks}
        busy_slots = {slot for job in busy.values() for slot in job.slots}
        match move:
            case "compute" if arguments[0] not in busy_blocks:
                blocks[arguments[0]] = float(number)
                harness.compute(arguments[0], float(number))
            case "store" | "load":
                some = [block for block in arguments[0] if block not in busy_blocks]
                allowed = set(range(SLOTS)) if move == "store" else stored
                into = [slot for slot in arguments[1] if slot not in busy_slots and slot in allowed]
                count = min(arguments[2], len(some), len(into))
                if count:
                    job = TransferJob(number, move, tuple(some[:count]), tuple(into[:count]))
                    harness.queue(job)
                    busy[number] = job
            case "advance":
                stream = [harness.device.compute, *harness.device.sides][arguments[0]]
                for _ in range(arguments[1]):
                    stream.advance()
            case "submit":
                for _ in range(arguments[0]):
                    harness.submit()
        for done in harness.copier.finished():
            _settle(busy.pop(done.job.id), blocks, slots, stored)
    for done in harness.run():
        _settle(busy.pop(done.job.id), blocks, slots, stored)
    assert not busy
    assert [harness.value(block) if value >= 0 else value for block, value in enumerate(blocks)] == blocks


def _settle(job: TransferJob, blocks: list[float], slots: list[float], stored: set[int]) -> None:
    for block, slot in zip(job.blocks, job.slots, strict=True):
        if job.kind == "store":
            slots[slot] = blocks[block]
            stored.add(slot)
        else:
            blocks[block] = slots[slot]
