"""Bytes and order of the copies, with negative controls that have to fail."""

from __future__ import annotations

import random
from typing import Any, Final

import torch

from benchmarks.gpu.kv_caches import DEEP, LAYOUTS, SMALL, in_order
from benchmarks.gpu.report import Report
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.worlds import Fault, Gpu, Paper, World
from tokencake_vllm.transfer.block_memory import pin
from tokencake_vllm.transfer.self_check import SelfCheck, self_check

BLOCKS: Final = 64
SOME: Final = 16
CONTROL_ROUNDS: Final = 5


def _rig(world: World, layout: str = "LBNHC", blocks: int = BLOCKS, slots: int = BLOCKS) -> Rig:
    shape = DEEP if world.is_real else SMALL
    return Rig(world, LAYOUTS[layout](shape, blocks, world.device), blocks, slots)


def layouts(report: Report, world: World) -> None:
    """Store, wipe, load elsewhere: every byte of every layout, and no other byte."""
    draw = world.draw
    for layout in LAYOUTS:
        with _rig(world, layout, slots=48) as rig:
            # On made-up streams nothing goes on while the self-check waits.
            check = self_check(rig.copier, rig.views, 48) if world.is_real else SelfCheck(None)
            everything = list(range(BLOCKS))
            blocks, slots, targets = (
                draw.sample(everything, 40),
                draw.sample(range(48), 40),
                draw.sample(everything, 40),
            )
            stamps = [draw.randrange(100, 10**6) for _ in blocks]
            others = [block for block in everything if block not in blocks]
            rig.write(everything, everything)
            rig.write(blocks, stamps)
            rig.begin("store", blocks, slots)
            done = rig.wait()
            right = {"host": rig.is_on_host(slots, stamps)}
            rig.begin("wipe", blocks)
            done += rig.wait()
            pairs = list(zip(blocks, stamps, strict=True))[:5]
            right["wiped"] = not any(rig.is_on_device([block], [stamp]) for block, stamp in pairs)
            right["others untouched"] = rig.is_on_device(others, others)
            rig.begin("load", targets, slots)
            done += rig.wait()
            right["device"] = rig.is_on_device(targets, stamps)
            is_told = len(done) == 3 and all(each.ok for each in done)  # noqa: PLR2004  # the three jobs
            report.tell(
                f"layout {layout}",
                is_told and all(right.values()) and check.problem is None,
                self_check=check.problem or f"{check.blocks} blocks in {check.seconds * 1e3:.1f} ms",
                **right,
                views=len(rig.views),
                block=list(rig.views[0].shape[1:]),
                row_bytes=rig.rows[0].nbytes,
            )


def order(report: Report, kind: type[Gpu | Paper], draw: random.Random, rounds: int) -> None:
    """Behind a computation that stands still for a while. Without the wait for it, each check must see wrong bytes."""
    checks: list[tuple[str, Any, Fault]] = [
        ("a store reads what was computed before it", _is_store_behind, "waits for nothing"),
        ("a load overwrites only what has been read", _is_load_behind, "waits for nothing"),
        ("a store is told when its bytes are there", _is_told_behind, "ends at once"),
    ]
    for name, is_right, fault in checks:
        with _rig(kind(draw)) as rig:
            wrong = sum(not is_right(rig, turn) for turn in range(rounds))
        report.tell(name, not wrong, wrong=wrong, of=rounds)
        with _rig(kind(draw, fault)) as rig:
            wrong = sum(not is_right(rig, turn) for turn in range(CONTROL_ROUNDS))
        # Now and then the device happens to be late enough: most rounds must be wrong, not all.
        report.tell(f"control: {name}", 2 * wrong > CONTROL_ROUNDS, fault=fault, wrong=wrong, of=CONTROL_ROUNDS)


def _old_and_new(turn: int) -> tuple[list[int], list[int]]:
    return [turn * SOME + n + 1 for n in range(SOME)], [turn * SOME + n + 10**6 for n in range(SOME)]


def _some(rig: Rig) -> list[int]:
    return rig.world.draw.sample(range(BLOCKS), SOME)


def _is_store_behind(rig: Rig, turn: int) -> bool:
    blocks, slots, (old, new) = _some(rig), _some(rig), _old_and_new(turn)
    rig.write(blocks, old)
    step = rig.writer(blocks, rig.content(new))
    rig.world.settle()
    rig.world.compute(step)
    rig.begin("store", blocks, slots)
    rig.world.run_ahead()
    rig.wait()
    rig.world.settle()
    return rig.is_on_host(slots, new)


def _is_load_behind(rig: Rig, turn: int) -> bool:
    blocks, slots, (old, new) = _some(rig), _some(rig), _old_and_new(turn)
    rig.write(blocks, new)
    rig.begin("store", blocks, slots)
    rig.wait()
    rig.write(blocks, old)
    index, seen = rig.ids(blocks), list[torch.Tensor]()
    rig.world.settle()
    rig.world.compute(lambda: seen.append(rig.read(index)))
    rig.begin("load", blocks, slots)
    rig.world.run_ahead()
    rig.wait()
    rig.world.settle()
    return torch.equal(seen[0], rig.content(old)) and rig.is_on_device(blocks, new)


def _is_told_behind(rig: Rig, turn: int) -> bool:
    blocks, slots, (old, new) = _some(rig), _some(rig), _old_and_new(turn)
    rig.write(blocks, old)
    step = rig.writer(blocks, rig.content(new))
    rig.world.settle()
    rig.world.compute(step)
    rig.begin("store", blocks, slots)
    rig.wait()
    is_there = rig.is_on_host(slots, new)
    rig.world.settle()
    return is_there


def behind_a_graph(report: Report, world: Gpu) -> None:
    """A store reads what the replay of a CUDA graph wrote."""
    with _rig(world) as rig:
        blocks, slots, wrong, rounds = list(range(8, 8 + SOME)), list(range(SOME)), 0, 20
        source = rig.content([5] * SOME)
        step = rig.writer(blocks, source)
        rig.write(blocks, [1] * SOME)
        world.settle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for turn in range(rounds):
            _, stamps = _old_and_new(turn)
            source.copy_(rig.content(stamps))
            world.compute(graph.replay)
            rig.begin("store", blocks, slots)
            rig.wait()
            wrong += not rig.is_on_host(slots, stamps)
        report.tell("a store behind a CUDA graph", not wrong, wrong=wrong, of=rounds)


def failed_pin(report: Report, world: Gpu) -> None:
    """Memory that cannot be pinned: an error of its own, and the next kernel runs."""
    rows = torch.empty((4, 2**20), dtype=torch.uint8)
    pin(rows)
    raised = later = ""
    try:
        pin(rows)  # a second time is an error
    except RuntimeError as error:
        raised = str(error)
    try:
        torch.zeros(16, device=world.device).add_(1)
        world.settle()
    except RuntimeError as error:
        later = str(error)[:200]
    torch.cuda.cudart().cudaHostUnregister(rows.data_ptr())  # type: ignore[no-untyped-call]  # torch's
    report.tell("a failed pin leaves the device usable", bool(raised) and not later, raised=raised, next_kernel=later)


def soak(report: Report, world: World, steps: int) -> None:
    """Stores, loads and a computation that writes other blocks, all at once, as the scheduler would have it."""
    blocks, slots = (768, 512) if world.is_real else (48, 32)
    shape = DEEP if world.is_real else SMALL
    with Rig(world, in_order("LBNHC", shape, blocks, world.device), blocks, slots) as rig:
        run = _Soak(rig, blocks, slots)
        for _ in range(steps):
            run.step()
        is_right_at_the_end = run.end()
        report.tell(
            "soak",
            not run.wrong and is_right_at_the_end,
            steps=steps,
            jobs=run.ended,
            most_at_once=run.most,
            blocks_checked=run.checked,
            wrong=run.wrong,
            right_at_the_end=is_right_at_the_end,
        )


class _Soak:
    """The scheduler's side: it never touches a block or a slot of a copy under way."""

    def __init__(self, rig: Rig, blocks: int, slots: int) -> None:
        self.rig, self.draw = rig, rig.world.draw
        self.free_blocks, self.free_slots = set(range(blocks)), set(range(slots))
        self.on_device = list(range(blocks))
        """Stamps."""
        self.stored: dict[int, int] = {}
        """Stamps by slot."""
        self.under_way: dict[int, tuple[str, list[int], list[int], list[int]]] = {}
        self.stamp = blocks
        self.wrong = self.checked = self.ended = self.most = 0
        self.sizes = (1, 3, 17, 60, 130) if rig.world.is_real else (1, 3, 5)
        side = 4_096 if rig.world.is_real else 1
        self.matrix = torch.randn(side, side, dtype=torch.bfloat16, device=rig.world.device)
        rig.write(list(range(blocks)), self.on_device)
        rig.world.settle()

    def step(self) -> None:
        """One step of the computation, and perhaps a job of each kind."""
        self._compute()
        if len(self.under_way) < 24:  # noqa: PLR2004  # more than the lanes hold
            self._store(self.draw.choice(self.sizes))
            self._load(self.draw.choice(self.sizes))
        self.most = max(self.most, len(self.under_way))
        for _ in range(1 if self.rig.world.is_real else 40):
            self.rig.world.rest()
        for done in self.rig.finished():
            self._settle(done.job.id, done.ok)

    def _compute(self) -> None:
        mine = self._blocks(8)
        if mine:
            stamps = list(range(self.stamp, self.stamp + len(mine)))
            self.stamp += len(mine)
            write = self.rig.writer(mine, self.rig.content(stamps))
            if self.rig.world.is_real:
                for _ in range(3):
                    torch.mm(self.matrix, self.matrix)
                write()
            else:
                self.rig.world.compute(write)
            for block, stamp in zip(mine, stamps, strict=True):
                self.on_device[block] = stamp

    def _blocks(self, count: int) -> list[int]:
        return self.draw.sample(sorted(self.free_blocks), count) if len(self.free_blocks) > count else []

    def _store(self, count: int) -> None:
        blocks = self._blocks(count)
        if blocks and len(self.free_slots) > count:
            slots = self.draw.sample(sorted(self.free_slots), count)
            self.free_slots -= set(slots)
            self._begin("store", blocks, slots, [self.on_device[block] for block in blocks])

    def _load(self, count: int) -> None:
        blocks = self._blocks(count)
        if blocks and len(self.stored) >= count:
            slots = self.draw.sample(sorted(self.stored), count)
            self._begin("load", blocks, slots, [self.stored.pop(slot) for slot in slots])

    def _begin(self, kind: Any, blocks: list[int], slots: list[int], stamps: list[int]) -> None:
        self.free_blocks -= set(blocks)
        self.under_way[self.rig.begin(kind, blocks, slots)] = (kind, blocks, slots, stamps)

    def _settle(self, number: int, ok: bool) -> None:
        """What is told as ended is there at once: a store is looked at by the host, with nothing waited for."""
        kind, blocks, slots, stamps = self.under_way.pop(number)
        some = self.draw.sample(range(len(slots)), min(3, len(slots)))
        if kind == "store":
            is_right = self.rig.is_on_host([slots[n] for n in some], [stamps[n] for n in some])
            self.stored.update(zip(slots, stamps, strict=True))
        else:
            is_right = self.rig.is_on_device([blocks[n] for n in some], [stamps[n] for n in some])
            for block, stamp in zip(blocks, stamps, strict=True):
                self.on_device[block] = stamp
            self.free_slots |= set(slots)
        self.free_blocks |= set(blocks)
        self.ended, self.checked = self.ended + 1, self.checked + len(some)
        self.wrong += not (is_right and ok)

    def end(self) -> bool:
        """Everything has ended; whether all blocks and slots are what they are to be."""
        for done in self.rig.wait():
            self._settle(done.job.id, done.ok)
        self.rig.world.settle()
        is_on_host = not self.stored or self.rig.is_on_host(list(self.stored), list(self.stored.values()))
        return not self.under_way and is_on_host and self.rig.is_on_device(range(len(self.on_device)), self.on_device)
