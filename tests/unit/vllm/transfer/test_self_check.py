"""The self-check of the copies, and the sample that is compared while the engine runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.made_up_streams import Device
from tokencake_vllm.transfer import self_check as module
from tokencake_vllm.transfer.block_memory import block_views, host_rows, new_rows
from tokencake_vllm.transfer.checksums import ChecksumError, Checksums
from tokencake_vllm.transfer.jobs import TransferJob, TransferResult
from tokencake_vllm.transfer.self_check import SelfCheck, self_check
from tokencake_vllm.transfer.step_messages import StepReports
from tokencake_vllm.transfer.stream_copier import StreamCopier
from tokencake_vllm.transfer.thread_copier import ThreadCopier

BLOCKS, SLOTS = 12, 6


def caches() -> dict[str, torch.Tensor]:
    return {f"layer{n}": torch.arange(BLOCKS * 64, dtype=torch.float32).view(BLOCKS, 64) + n for n in range(3)}


class Faulty(ThreadCopier):
    """Carries jobs out, and afterwards does to the memory what a fault would."""

    def __init__(self, views: list[torch.Tensor], rows: torch.Tensor, fault: Any) -> None:
        super().__init__(views, rows, checksums=Checksums(0, len(rows)))
        self._fault = fault

    def finished(self) -> list[TransferResult]:
        done = super().finished()
        return [self._fault(self, result) or result for result in done]


def found_with(fault: Any, **options: Any) -> SelfCheck:
    views = block_views(caches(), BLOCKS)
    copier = Faulty(views, host_rows(views, SLOTS), fault)
    try:
        return self_check(copier, views, SLOTS, **options)
    finally:
        copier.close()


def lose_a_byte_on_the_host(copier: Faulty, result: TransferResult) -> None:
    if result.job.kind == "store":
        copier._slots[0][1].view(torch.uint8)[..., 0] ^= 1


def swap_two_blocks(copier: Faulty, result: TransferResult) -> None:
    if result.job.kind == "load":
        one, other = result.job.blocks[:2]
        copier._views[0][[one, other]] = copier._views[0][[other, one]]


def load_nothing(copier: Faulty, result: TransferResult) -> None:
    if result.job.kind == "load":
        copier._views[-1][result.job.blocks[-1]] = 0


def fail(copier: Faulty, result: TransferResult) -> TransferResult:
    return TransferResult(result.job, result.seconds, ok=False)


@pytest.mark.parametrize("fault", [lose_a_byte_on_the_host, swap_two_blocks, load_nothing])
def test_a_fault_of_the_copies_is_found(fault: Any) -> None:
    assert found_with(fault).problem is not None
    assert "came back with other bytes" in found_with(fault).problem


def test_a_copy_that_fails_is_a_problem() -> None:
    assert found_with(fail).problem == "a store of 4 blocks failed; the worker's log says why"


def test_a_copy_that_never_ends_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(ThreadCopier):
        def start(self, job: TransferJob) -> None:
            """Forget it."""

    views = block_views(caches(), BLOCKS)
    copier = Stuck(views, host_rows(views, SLOTS), checksums=Checksums(0, SLOTS))
    assert self_check(copier, views, SLOTS, timeout_s=0.01).problem == "a store of 4 blocks took more than 0.01 s"
    copier.close()


def test_an_error_is_a_problem_and_does_not_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("made up")

    monkeypatch.setattr(module, "_pattern", broken)
    assert found_with(lambda *_: None).problem == "MemoryError: made up"


@pytest.mark.parametrize("fault", [lambda *_: None, load_nothing])
def test_the_blocks_hold_afterwards_what_they_held_before(fault: Any) -> None:
    layers = caches()
    views = block_views(layers, BLOCKS)
    copier = Faulty(views, host_rows(views, SLOTS), fault)
    self_check(copier, views, SLOTS)
    copier.close()
    assert all(torch.equal(layers[name], layer) for name, layer in caches().items())


def test_the_sequence_of_random_numbers_stays_as_it_was() -> None:
    before = torch.random.get_rng_state()
    assert found_with(lambda *_: None).problem is None
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("blocks", "slots", "checked"), [(2, 4, 0), (3, 4, 1), (12, 1, 1), (12, 0, 0), (40, 40, 4)])
def test_a_small_device_is_checked_with_what_it_has(blocks: int, slots: int, checked: int) -> None:
    views = block_views({"layer": torch.zeros(blocks, 8)}, blocks)
    copier = ThreadCopier(views, new_rows(views, slots, "cpu"), checksums=Checksums(0, slots))
    found = self_check(copier, views, slots)
    copier.close()
    assert (found.problem, found.blocks) == (None, checked)


def test_ranks_tell_of_the_problem_or_of_the_slowest() -> None:
    quick, slow, bad = SelfCheck(None, 4, 1, 0.1), SelfCheck(None, 4, 1, 0.2), SelfCheck("a fault", 4, 1, 0.01)
    told = StepReports(slots=(1, 1), self_check=quick).aggregate(StepReports(slots=(1, 1), self_check=slow))
    assert told.self_check is slow
    assert told.aggregate(StepReports(slots=(0, 0), self_check=bad)).self_check is bad
    assert StepReports(mismatches=(1,)).aggregate(StepReports(mismatches=(2,))).mismatches == (1, 2)


# --- the sample ---------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 60))
def test_one_slot_in_so_many_is_in_the_sample_and_of_few_slots_one(every: int, slots: int) -> None:
    checksums = Checksums(every, slots)
    sampled = sum(checksums.has(slot) for slot in range(slots))
    assert sampled == (0 if not every else -(-slots // min(every, slots)))


def test_a_slot_that_was_overwritten_in_between_is_found() -> None:
    checksums = Checksums(1, 4)
    checksums.compare("store", 2, 11, 11)
    checksums.compare("load", 2, 11, 11)
    with pytest.raises(ChecksumError, match="slot 2"):
        checksums.compare("load", 2, 12, 12)
    checksums.forget(2)
    checksums.compare("load", 2, 12, 12)


class Streams:
    """A copier on made-up streams, with one slot in two in the sample."""

    def __init__(self) -> None:
        self.device = Device()
        self.views = block_views(caches(), BLOCKS)
        self.rows = new_rows(self.views, SLOTS, "cpu").zero_()
        self.copier = StreamCopier(
            self.views, self.rows, checksums=Checksums(2, SLOTS), cuda=self.device, spawn=lambda _: None
        )

    def finish(self, job: TransferJob, before_it_is_told: Any = lambda: None) -> TransferResult:
        with self.device:
            self.copier.start(job)
            while self.copier.advance():
                pass
        for stream in [self.device.compute, *self.device.sides]:
            stream.synchronize()
        before_it_is_told()
        (result,) = self.copier.finished()
        return result


@pytest.fixture
def engine() -> Iterator[Streams]:
    streams = Streams()
    yield streams
    streams.copier.close()


def test_sampled_copies_on_streams_are_compared_as_they_were_when_the_job_ran(engine: Streams) -> None:
    stored = engine.finish(TransferJob(1, "store", (5, 6, 7), (0, 1, 2)))
    loaded = engine.finish(TransferJob(2, "load", (8, 9), (0, 2)))
    assert (stored.ok, stored.is_mismatch, loaded.ok) == (True, False, True)


def test_a_sampled_slot_with_other_bytes_fails_its_copy_as_a_mismatch(engine: Streams) -> None:
    result = engine.finish(TransferJob(1, "store", (5, 6), (0, 1)), lambda: engine.rows[0].add_(1))
    assert (result.ok, result.is_mismatch) == (False, True)
    assert engine.finish(TransferJob(2, "store", (5, 6), (0, 1))).ok, "the buffer is free again"


def test_a_slot_outside_the_sample_is_not_compared(engine: Streams) -> None:
    assert engine.finish(TransferJob(1, "store", (5, 6), (1, 3)), lambda: engine.rows[1].add_(1)).ok
