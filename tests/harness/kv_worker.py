"""KV worker of tests: for each block, its memory holds the hash of what was last computed or copied there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import ANSWER, Batch, StepLoop
from tokencake import protocol

GARBAGE = b"garbage"
PROMPT = list(range(100))


class Clock:
    """Stands for the module `time` in the plug-in."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class KVWorker:
    """Carries out transfer jobs one by one, when it is told to."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.device = [GARBAGE] * blocks
        self.host = [GARBAGE] * slots
        self.jobs: list[Any] = []

    def finish(self, index: int = 0, *, ok: bool = True) -> Any:
        """Carry out the job at `index`; one that fails may have left anything where it writes."""
        job = self.jobs.pop(index)
        for position, block in enumerate(job.blocks):
            if job.kind == "wipe":
                self.device[block] = GARBAGE
            elif not ok:
                if job.kind == "load":
                    self.device[block] = GARBAGE
                else:
                    self.host[job.slots[position]] = GARBAGE
            elif job.kind == "store":
                self.host[job.slots[position]] = self.device[block]
            else:
                self.device[block] = self.host[job.slots[position]]
        return job


class SchedulerHarness(StepLoop):
    """The plug-in's scheduler with the Time Scheduler on, its worker and its clock.

    Every step checks that what a request reads was computed or copied there before; `check` that every block on the
    device and on the host has the owners that its reference count tells.

    Args:
        monkeypatch: sets the clock of the plug-in.
        space: settings of the Space Scheduler; off where they are absent.
        num_blocks: KV blocks of the device.
        host_blocks: blocks of host memory.
        is_async: whether vLLM schedules ahead.
        max_tokens_per_step: vLLM's `max_num_batched_tokens`.
        max_seqs: vLLM's `max_num_seqs`.
        time: settings of the Time Scheduler.
    """

    def __init__(
        self,
        monkeypatch: Any,
        space: dict[str, Any] | None = None,
        *,
        num_blocks: int = 64,
        host_blocks: int = 200,
        is_async: bool = False,
        max_tokens_per_step: int = 256,
        max_seqs: int = 16,
        **time: Any,
    ) -> None:
        self.clock = Clock()
        for module in ("connector", "scheduler"):
            monkeypatch.setattr(f"tokencake_vllm.{module}.time", self.clock)
        scheduler = build_scheduler(
            is_async=is_async,
            num_blocks=num_blocks,
            host_blocks=host_blocks,
            max_tokens_per_step=max_tokens_per_step,
            max_seqs=max_seqs,
            space={"enabled": False} if space is None else space,
            time=time,
        )
        super().__init__(scheduler)
        self.cache = self.scheduler.offload.stalls.cache
        self.worker = KVWorker(self.pool.num_gpu_blocks, self.cache.tier.capacity)
        self._failed: set[str] = set()
        self._finished: set[str] = set()
        self._reports: dict[int, tuple[int, float, bool]] = {}
        self._made = 0
        self._prompts: dict[str, list[int]] = {}

    # --- what clients do ----------------------------------------------------------------------------

    def call(self, tokens: list[int], session: str = "s", max_tokens: int = 4, **hint: Any) -> str:
        """Add a hinted request; returns its id."""
        self._made += 1
        name = f"r{self._made}"
        text = protocol.Hint(session=session, call=name, agent="writer", **hint).to_json()
        self._prompts[name] = tokens
        self.add(make_request(name, tokens, text, max_tokens))
        return name

    def answer(self, tokens: list[int], **hint: Any) -> str:
        """Add a hinted request and run it to its end; returns its id."""
        name = self.call(tokens, **hint)
        self.run()
        return name

    def long_stall(self, tokens: list[int] = PROMPT, **hint: Any) -> str:
        """`answer`, for a call that ends in a tool of 60 s."""
        return self.answer(tokens, **{"expects_tools": {"build": 60.0}, "reuse": "extends", **hint})

    def follow_up(self, name: str, more: int = 20) -> list[int]:
        """The prompt of a call that extends the answered call `name` by `more` tokens."""
        return self._prompts[name] + [ANSWER] * 4 + [1_000 + more] * more

    def send(self, *events: Any) -> list[str]:
        """Send events; returns their outcomes."""
        wire = [protocol.to_wire(event) for event in events]
        outcomes: list[str] = self.scheduler.tokencake_events(wire, self.clock.now)["outcomes"]
        return outcomes

    # --- what the engine does -----------------------------------------------------------------------

    def finish_job(self, index: int = 0, *, ok: bool = True) -> None:
        """Carry out a job, to be reported with the next step that completes."""
        ok = ok and bool(self.worker.jobs[index].blocks)
        job = self.worker.finish(index, ok=ok)
        self._reports[job.id] = (1, 0.001, ok)
        if job.request is not None:
            self._finished.add(job.request)
            if not ok:
                self._failed.add(job.request)

    def complete(self, *, finish_jobs: bool = False) -> None:
        """Complete the oldest step under way, and with `finish_jobs` all transfers that have been queued."""
        from vllm.v1.outputs import KVConnectorOutput

        from tokencake_vllm.transfer.step_messages import StepReports

        batch = self.under_way[0]
        self._read(batch)
        self._write(batch)
        self.worker.jobs += batch.output.kv_connector_metadata.jobs
        while finish_jobs and self.worker.jobs:
            self.finish_job()
        self.transfers = KVConnectorOutput(
            finished_recving=self._finished or None,
            failed_recving=self._failed,
            kv_connector_worker_meta=StepReports(self._reports) if self._reports else None,
        )
        self._finished, self._failed, self._reports = set(), set(), {}
        super().complete()
        self._write(batch)  # with async scheduling the tokens, and so the hashes, are known only now
        self.clock.now += 0.01

    def run(self, limit: int = 300, *, finish_jobs: bool = True, **how: Any) -> None:
        """Step until nothing is left to do."""
        super().run(limit, finish_jobs=finish_jobs, **how)

    def wipe(self) -> None:
        """Overwrite every free device block."""
        self.cache.wipe()
        self.run()

    def _read(self, batch: Batch) -> None:
        """What a step reads was computed or copied before, or is computed in it."""
        written = {block for _, table, first, last in batch.spans for block in table[first:last]}
        for request, table, first, _ in batch.spans:
            for block, key in zip(table[:first], request.block_hashes, strict=False):
                if block not in written:
                    assert self.worker.device[block] == key, f"{request.request_id} reads something else in {block}"

    def _write(self, batch: Batch) -> None:
        for request, table, first, last in batch.spans:
            for index in range(first, min(last, len(request.block_hashes))):
                self.worker.device[table[index]] = bytes(request.block_hashes[index])

    # --- what must hold -----------------------------------------------------------------------------

    def check(self) -> None:
        """Every block has its owners, every hit and every load would read what it asks for, no error was contained."""
        scheduler, pool, cache = self.scheduler, self.pool, self.cache
        assert not scheduler.registry.counts["errors",], "an exception was caught"
        owners: Counter[int] = Counter()
        for table in scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks.values():
            owners.update(block.block_id for block in table)
        for blocks in cache.pinned.values():
            owners.update(block.block_id for block in blocks)
        for _, blocks in scheduler.deferred_frees:
            owners.update(block.block_id for block in blocks)
        for copy in cache.transfers._copies.values():
            owners.update(block.block_id for block in copy.device)
        free = pool.free_block_queue.get_all_free_blocks()
        free_ids = [block.block_id for block in free]
        assert len(free_ids) == len(set(free_ids)) == pool.get_num_free_blocks()
        for block in pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == owners[block.block_id], f"block {block.block_id}"
                assert (block.ref_cnt == 0) == (block.block_id in set(free_ids))
        unwritten = {block for b in self.under_way for _, table, first, last in b.spans for block in table[first:last]}
        for full, cached in list(pool.cached_block_hash_to_block._cache.items()):
            for block in cached.values() if isinstance(cached, dict) else [cached]:
                if block.block_id not in unwritten:
                    assert self.worker.device[block.block_id] == full[:-4], "a hit would read something else"
        assert not cache.tier.broken_rules()
        for block in cache.tier._blocks.values():
            if block.is_ready:
                assert self.worker.host[block.slot] == block.key, "a load would read something else"

    def cached_tokens(self, name: str) -> tuple[int, int]:
        """Prompt tokens of the call that were found on the device and on the host."""
        (call,) = [c for c in self.scheduler.tokencake_state(None, None, 10_000)["calls"] if c["call"] == name]
        return call["cached_tokens"]["device"], call["cached_tokens"]["host"]

    def count(self, *key: str) -> float:
        """A counter of the registry."""
        counted: float = self.scheduler.registry.counts[key]
        return counted


MakeHarness = Callable[..., SchedulerHarness]
"""The fixture `make_harness`, with the arguments of `SchedulerHarness` behind the first."""
