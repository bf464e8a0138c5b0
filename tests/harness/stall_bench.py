"""vLLM's scheduler with our connector in this process, and a worker whose memory holds, for each block, its hash."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokencake import protocol

BLOCK_SIZE = 16
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


class Worker:
    """Carries out jobs when told to; every block and slot holds what was last written there."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.device = [GARBAGE] * blocks
        self.host = [GARBAGE] * slots
        self.jobs: list[Any] = []

    def finish(self, index: int = 0, *, ok: bool = True) -> Any:
        job = self.jobs.pop(index)
        for place, block in enumerate(job.blocks):
            if job.kind == "wipe":
                self.device[block] = GARBAGE
            elif not ok:  # a copy that failed halfway has left anything
                if job.kind == "load":
                    self.device[block] = GARBAGE
                else:
                    self.host[job.slots[place]] = GARBAGE
            elif job.kind == "store":
                self.host[job.slots[place]] = self.device[block]
            else:
                self.device[block] = self.host[job.slots[place]]
        return job


class Batch:
    """A step under way: which calls get a token, and which full blocks it fills."""

    def __init__(self, output: Any, scheduler: Any) -> None:
        self.output = output
        self.sampling = {n for n in output.num_scheduled_tokens if not scheduler.requests[n].is_prefill_chunk}
        self.spans = []
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            table = list(scheduler.kv_cache_manager.get_block_ids(name)[0])
            end = request.num_computed_tokens
            self.spans.append((request, table, (end - count) // BLOCK_SIZE, min(end // BLOCK_SIZE, len(table))))


class Bench:
    """One scheduler, its worker and its clock."""

    def __init__(self, model: Path, monkeypatch: Any, **options: Any) -> None:
        self.clock = Clock()
        for module in ("connector", "scheduler"):
            monkeypatch.setattr(f"tokencake_vllm.{module}.time", self.clock)
        self.scheduler = build(model, **options)
        self.cache = self.scheduler.offload.stalls.cache
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = Worker(self.pool.num_gpu_blocks, self.cache.tier.capacity)
        self.failed: set[str] = set()
        self.finished: set[str] = set()
        self.reports: dict[int, tuple[int, float, bool]] = {}
        self.under_way: list[Batch] = []
        self.made = 0
        self.texts: dict[str, list[int]] = {}
        self.told: dict[str, Any] = {}

    # --- what clients do ----------------------------------------------------------------------------

    def call(self, tokens: list[int], session: str = "s", max_tokens: int = 4, **hint: Any) -> str:
        self.made += 1
        name = f"r{self.made}"
        text = protocol.Hint(session=session, call=name, agent="writer", **hint).to_json()
        request = make_request(name, tokens, text, max_tokens)
        self.texts[name] = tokens
        self.scheduler.add_request(request)
        return name

    def tell(self, *events: Any) -> list[str]:
        return self.scheduler.tokencake_events([protocol.to_wire(e) for e in events], self.clock.now)["outcomes"]

    def follow_up(self, name: str, more: int = 20) -> list[int]:
        """The prompt of a call that extends the answered call `name`."""
        return self.texts[name] + [7] * 4 + [1_000 + more] * more

    # --- what the engine does -----------------------------------------------------------------------

    def finish_job(self, index: int = 0, *, ok: bool = True) -> None:
        ok = ok and bool(self.worker.jobs[index].blocks)
        job = self.worker.finish(index, ok=ok)
        self.reports[job.id] = (1, 0.001, ok)
        if job.request is not None:
            self.finished.add(job.request)
            if not ok:
                self.failed.add(job.request)

    def step(self, *, finish_jobs: bool = False) -> Any:
        """Schedule; then complete the oldest step, with async scheduling one step later."""
        scheduler = self.scheduler
        output = scheduler.schedule()
        batch = Batch(output, scheduler)
        self.under_way.append(batch)
        is_async = scheduler.scheduler_config.async_scheduling
        if is_async and len(self.under_way) < 2 and (output.total_num_scheduled_tokens or scheduler.has_requests()):
            return output
        self._complete(self.under_way.pop(0), finish_jobs=finish_jobs)
        return output

    def _complete(self, batch: Batch, *, finish_jobs: bool) -> None:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        from tokencake_vllm.transfer.step_messages import StepReports

        self._read(batch)
        self._write(batch)
        self.worker.jobs += batch.output.kv_connector_metadata.jobs
        while finish_jobs and self.worker.jobs:
            self.finish_job()
        transfers = KVConnectorOutput(
            finished_recving=self.finished or None,
            failed_recving=self.failed,
            kv_connector_worker_meta=StepReports(self.reports) if self.reports else None,
        )
        self.finished, self.failed, self.reports = set(), set(), {}
        ids = list(batch.output.num_scheduled_tokens)
        outputs = self.scheduler.update_from_output(
            batch.output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: index for index, name in enumerate(ids)},
                sampled_token_ids=[[7] if name in batch.sampling else [] for name in ids],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
                kv_connector_output=transfers,
            ),
        )
        self._write(batch)  # with async scheduling the tokens, and so the hashes, are known only now
        for engine_output in (o for group in outputs.values() for o in group.outputs):
            if engine_output.finished:
                self.told[engine_output.request_id] = engine_output.kv_transfer_params
        self.clock.now += 0.01

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

    def run(self, limit: int = 300, *, finish_jobs: bool = True) -> None:
        for _ in range(limit):
            if self.scheduler.has_requests():
                self.step(finish_jobs=finish_jobs)
            elif self.under_way:
                self._complete(self.under_way.pop(0), finish_jobs=finish_jobs)
            else:
                return
        raise AssertionError("the engine does not come to rest")

    def answer(self, tokens: list[int], **hint: Any) -> str:
        name = self.call(tokens, **hint)
        self.run()
        return name

    def wipe(self) -> None:
        """Every free device block is overwritten."""
        self.cache.wipe()
        self.run()

    # --- what must hold -----------------------------------------------------------------------------

    def check(self) -> None:
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
        for full, found in list(pool.cached_block_hash_to_block._cache.items()):
            for block in found.values() if isinstance(found, dict) else [found]:
                if block.block_id not in unwritten:
                    assert self.worker.device[block.block_id] == full[:-4], "a hit would read something else"
        assert not cache.tier.broken_rules()
        for block in cache.tier._blocks.values():
            if block.is_ready:
                assert self.worker.host[block.slot] == block.key, "a load would read something else"

    def tokens_found(self, name: str) -> tuple[int, int]:
        """Prompt tokens of the call found on the device and on the host."""
        (call,) = [c for c in self.scheduler.tokencake_state(None, None, 10_000)["calls"] if c["call"] == name]
        return call["cached_tokens"]["device"], call["cached_tokens"]["host"]

    def count(self, *key: str) -> float:
        return self.scheduler.registry.counts[key]


def build(
    model: Path,
    *,
    num_blocks: int = 64,
    host_blocks: int = 200,
    is_async: bool = False,
    max_tokens_per_step: int = 256,
    max_seqs: int = 16,
    create: Callable[..., Any] | None = None,
    connector: bool = True,
    **settings: Any,
) -> Any:
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        KVTransferConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from tokencake_vllm.scheduler import create_scheduler

    transfer = KVTransferConfig(
        kv_connector="TokenCakeConnector",
        kv_connector_module_path="tokencake_vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"host_blocks": host_blocks},
    )
    config = VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="bfloat16", max_model_len=2_048),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_seqs,
            max_num_batched_tokens=max_tokens_per_step,
            max_model_len=2_048,
            is_encoder_decoder=False,
            async_scheduling=is_async,
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=transfer if connector else None,
        additional_config={"tokencake": {"time": settings, "space": {"enabled": False}}},
    )
    config.scheduler_config.async_scheduling = is_async
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    return (create or create_scheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=True,
    )


_hasher = SimpleNamespace(hash=None)


def make_request(name: str, tokens: list[int], hint: str | None, max_tokens: int) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    if _hasher.hash is None:
        init_none_hash(sha256)
        _hasher.hash = get_request_block_hasher(BLOCK_SIZE, sha256)
    extra = None if hint is None else {"tokencake": hint}
    params = SamplingParams(ignore_eos=True, max_tokens=max_tokens, extra_args=extra)
    return Request(name, tokens, params, None, arrival_time=0.0, block_hasher=_hasher.hash)


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def long_stall(engine: Bench, tokens: list[int] = PROMPT, **hint: Any) -> str:
    """A call that ends in a tool of 60 s."""
    return engine.answer(tokens, **{"expects_tools": {"build": 60.0}, "reuse": "extends", **hint})
