"""The worker's copies on CPU tensors: every layout, and every way to fail."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import torch

from tokencake_vllm.transfer import thread_copier
from tokencake_vllm.transfer.block_memory import block_views, host_rows
from tokencake_vllm.transfer.checksums import Checksums
from tokencake_vllm.transfer.copier import make_copier
from tokencake_vllm.transfer.jobs import NoCopier, TransferJob
from tokencake_vllm.transfer.step_messages import StepReports
from tokencake_vllm.transfer.thread_copier import ThreadCopier

BLOCKS, LAYERS = 6, 3
PATIENCE_S = 60
"""How long a test waits for what has to come: it ends a hang, and measures nothing."""


def fill(tensor: Any) -> Any:
    return tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))


def layers_of_one_allocation() -> dict[str, Any]:
    storage = fill(torch.empty(LAYERS, BLOCKS, 2, 4, 8))
    return {f"layer{number}": storage[number] for number in range(LAYERS)}


def layers_inside_each_block() -> dict[str, Any]:
    storage = fill(torch.empty(BLOCKS, LAYERS, 2, 4, 8))
    return {f"layer{number}": storage[:, number] for number in range(LAYERS)}


def separate_layers() -> dict[str, Any]:
    return {f"layer{number}": fill(torch.empty(BLOCKS, 2, 4, 8)) + number for number in range(LAYERS)}


def kernel_blocks() -> dict[str, Any]:
    return {f"layer{number}": fill(torch.empty(BLOCKS * 2, 2, 2, 8)) + number for number in range(LAYERS)}


def keys_and_values_first() -> dict[str, Any]:
    return {f"layer{number}": fill(torch.empty(2, BLOCKS, 4, 8)) + number for number in range(LAYERS)}


LAYOUTS = [
    layers_of_one_allocation,
    layers_inside_each_block,
    separate_layers,
    kernel_blocks,
    keys_and_values_first,
]


def block_of(caches: dict[str, Any], block: int) -> list[Any]:
    """A block of each layer, found without the code under test."""
    found = []
    for cache in caches.values():
        if cache.shape[0] == BLOCKS * 2:
            found.append(cache[2 * block : 2 * block + 2].clone())
        else:
            found.append((cache[block] if cache.shape[0] == BLOCKS else cache[:, block]).clone())
    return found


def finish(copier: Any, count: int = 1) -> list[Any]:
    done: list[Any] = []
    until = time.monotonic() + PATIENCE_S
    while len(done) < count:
        assert time.monotonic() < until
        done += copier.finished()
        time.sleep(0.001)
    return done


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_comes_back_bit_by_bit(layout: Any) -> None:
    caches = layout()
    copier = make_copier(caches, BLOCKS, 4, checksum_every=1)
    before = [block_of(caches, block) for block in (1, 4)]
    others = [block_of(caches, block) for block in (0, 2, 3)]
    copier.start(TransferJob(1, "store", (1, 4), (3, 0)))
    finish(copier)
    copier.start(TransferJob(2, "wipe", (1, 4, 5)))
    finish(copier)
    assert not torch.equal(block_of(caches, 1)[0], before[0][0])
    copier.start(TransferJob(3, "load", (5, 1), (3, 0)))
    (done,) = finish(copier)
    assert done.ok
    for block, expected in zip((5, 1), before, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(block_of(caches, block), expected, strict=True))
    for block, expected in zip((0, 2, 3), others, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(block_of(caches, block), expected, strict=True))
    copier.close()


def test_layers_that_lie_evenly_are_copied_as_one() -> None:
    assert len(block_views(layers_of_one_allocation(), BLOCKS)) == 1
    assert len(block_views(layers_inside_each_block(), BLOCKS)) == 1
    assert len(block_views(separate_layers(), BLOCKS)) == LAYERS


def test_a_shared_cache_is_copied_once() -> None:
    caches = separate_layers()
    caches["again"] = caches["layer0"]
    assert len(block_views(caches, BLOCKS)) == LAYERS


def test_a_job_that_cannot_be_done_is_reported_and_the_next_goes_on() -> None:
    copier = make_copier(separate_layers(), BLOCKS, 4, checksum_every=0)
    copier.start(TransferJob(1, "store", (1,), (99,)))
    copier.start(TransferJob(2, "store", (1,), (2,)))
    assert {done.job.id: done.ok for done in finish(copier, 2)} == {1: False, 2: True}
    copier.close()


def test_a_block_that_changed_on_the_host_fails_its_checksum() -> None:
    views = block_views(separate_layers(), BLOCKS)
    rows = host_rows(views, 4)
    copier = ThreadCopier(views, rows, checksums=Checksums(1, len(rows)))
    copier.start(TransferJob(1, "store", (1,), (2,)))
    finish(copier)
    rows[2] += 1
    copier.start(TransferJob(2, "load", (3,), (2,)))
    (done,) = finish(copier)
    assert not done.ok
    copier.close()


class Clock:
    """The copier's own clock: each look at it takes a tick, and a rest passes at once, or with `rests_on` never."""

    TICK_S = 1e-4

    def __init__(self, *, rests_on: bool) -> None:
        self.now = 0.0
        clock = self

        class Condition(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:
                if timeout is None or rests_on:
                    return super().wait()
                clock.now += timeout
                return False

        self.Condition = Condition
        self.Thread, self.get_native_id = threading.Thread, threading.get_native_id

    def perf_counter(self) -> float:
        self.now += self.TICK_S
        return self.now


def big_copier(monkeypatch: pytest.MonkeyPatch, blocks: int, *, rests_on: bool = True) -> tuple[ThreadCopier, Clock]:
    """Blocks of 256 KiB; a copier whose rests end when something changes, or at once."""
    clock = Clock(rests_on=rests_on)
    monkeypatch.setattr(thread_copier, "time", clock)
    monkeypatch.setattr(thread_copier, "threading", clock)
    views = block_views({"layer": torch.zeros(blocks, 1, 1, 64 * 1_024)}, blocks)
    return ThreadCopier(views, host_rows(views, blocks), checksums=Checksums(0, blocks)), clock


@pytest.mark.parametrize("kind", ["store", "load"])
def test_while_a_step_computes_a_copy_takes_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    copier, clock = big_copier(monkeypatch, 100, rests_on=False)
    copier.pace(is_computing=True, urgent=())
    began = clock.now
    copier.start(TransferJob(1, kind, tuple(range(100)), tuple(range(100))))
    (done,) = finish(copier)
    assert 0 < done.seconds < 0.05 * (clock.now - began)
    copier.close()


def test_a_copy_that_a_call_waits_for_overtakes_and_does_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    copier, _ = big_copier(monkeypatch, 400)
    copier.pace(is_computing=True, urgent=())
    everything = tuple(range(200))
    copier.start(TransferJob(1, "store", everything, everything))
    copier.start(TransferJob(2, "load", tuple(range(200, 300)), tuple(range(200, 300)), "call"))
    assert [done.job.id for done in finish(copier)] == [2]
    copier.start(TransferJob(3, "load", tuple(range(300, 400)), tuple(range(300, 400))))
    copier.pace(is_computing=True, urgent=(3,))
    assert [done.job.id for done in finish(copier)] == [3]
    copier.pace(is_computing=False, urgent=())
    assert [done.job.id for done in finish(copier)] == [1]
    copier.close()


def test_a_copier_that_is_closed_leaves_the_rest_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    copier, _ = big_copier(monkeypatch, 200)
    copier.pace(is_computing=True, urgent=())
    copier.start(TransferJob(1, "store", tuple(range(200)), tuple(range(200))))
    copier.close()
    assert not copier._thread.is_alive()
    assert copier.finished() == []


def test_a_copier_that_is_drained_has_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    copier, _ = big_copier(monkeypatch, 200)
    copier.pace(is_computing=True, urgent=())
    copier.start(TransferJob(1, "store", tuple(range(200)), tuple(range(200))))
    copier.start(TransferJob(2, "load", (0,), (0,)))
    copier.drain()
    assert {done.job.id for done in copier.finished()} == {1, 2}
    copier.drain()  # twice is once
    copier.close()
    copier.drain()


def test_without_host_memory_every_job_fails_and_nothing_raises() -> None:
    def refuse(*_: Any) -> Any:
        raise MemoryError("no")

    copier = make_copier(separate_layers(), BLOCKS, 4, checksum_every=0, allocate=refuse)
    assert isinstance(copier, NoCopier)
    copier.start(TransferJob(1, "store", (1,), (2,)))
    copier.drain()
    assert [done.ok for done in copier.finished()] == [False]
    copier.close()


def test_a_layout_that_is_not_known_turns_copying_off() -> None:
    assert isinstance(make_copier({"layer": torch.empty(5, 5)}, 4, 4, checksum_every=0), NoCopier)


def test_reports_of_two_ranks_add_up() -> None:
    one, two = StepReports({1: (1, 0.5, True), 2: (1, 0.1, True)}), StepReports({1: (1, 0.7, False)})
    assert one.aggregate(two) == StepReports({1: (2, 0.7, False), 2: (1, 0.1, True)})
