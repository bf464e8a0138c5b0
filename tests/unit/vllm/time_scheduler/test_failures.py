"""Whatever breaks on either side of the connector is told and costs computing again: no wrong hit, no lost call."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from tests.harness.kv_worker import PROMPT, MakeHarness, SchedulerHarness
from tests.harness.scheduler import build_scheduler
from tokencake import protocol
from tokencake_vllm.connector import TokenCakeConnector
from tokencake_vllm.transfer import host_memory
from tokencake_vllm.transfer.host_memory import Memory
from tokencake_vllm.transfer.host_size import block_bytes_of, host_slots, unsupported_reason
from tokencake_vllm.transfer.jobs import NoCopier, TransferJob
from tokencake_vllm.transfer.step_messages import StepJobs, StepReports


def stalled_elsewhere(engine: SchedulerHarness) -> str:
    """A call whose prefix is on the host only."""
    name = engine.answer(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    engine.wipe()
    return name


# --- the scheduler's side -----------------------------------------------------------------------------


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("made up")


@pytest.mark.parametrize("place", ["match", "admit", "store", "forget_match", "upload", "pin", "unpin", "on_device"])
def test_a_defect_in_the_cache_costs_no_call(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = make_harness()
    name = stalled_elsewhere(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, place, broken)
        engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=60.0))
        engine.run()
        calls = [
            engine.answer(engine.follow_up(name), expects_tools={"ls": 0.01}),
            engine.answer([900 + i for i in range(100)], session="u", expects_tools={"build": 60.0}),
        ]
        assert {engine.scheduler.registry.calls[call].status for call in calls} == {"finished"}
    assert engine.kv_params[engine.answer(PROMPT, session="t")] is not None
    assert engine.scheduler.registry.counts.pop(("errors",), 0) > 0
    assert engine.scheduler.reset_prefix_cache()  # nothing is held for ever
    engine.check()


def test_a_load_that_could_not_be_queued_fails_instead_of_being_waited_for(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_harness()
    name = stalled_elsewhere(engine)
    monkeypatch.setattr("tokencake_vllm.transfer.in_flight.InFlightTransfers.begin", broken)
    follow_up = engine.call(engine.follow_up(name), reuse="final")
    engine.step()
    (job,) = engine.worker.jobs
    assert (job.request, job.blocks) == (follow_up, ())
    engine.run()
    assert engine.scheduler.registry.calls[follow_up].status == "finished"
    assert engine.count("errors") == 1


def test_a_defect_at_the_end_of_a_copy_does_not_stop_the_others(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_harness()
    for number in range(2):
        engine.call([1_000 * number + i for i in range(40)], session=f"s{number}", expects_tools={"build": 60.0})
    while len(engine.worker.jobs) < 2:
        engine.step()
    settle, faults = engine.cache.tier.settle, [ZeroDivisionError("made up")]

    def fails_once(*args: Any, **kwargs: Any) -> None:
        if faults:
            raise faults.pop()
        settle(*args, **kwargs)

    monkeypatch.setattr(engine.cache.tier, "settle", fails_once)
    engine.run()
    assert engine.count("errors") == 1
    assert not engine.cache.is_busy


def test_a_copy_that_fails_halfway_is_no_hit_on_either_side(make_harness: MakeHarness) -> None:
    engine = make_harness(job_mib=0.008)  # a chain of six blocks takes several jobs
    name = engine.call(PROMPT, expects_tools={"build": 60.0}, reuse="extends")
    while not engine.worker.jobs:
        engine.step()
    assert len(engine.worker.jobs) == 3
    engine.finish_job(1, ok=False)
    engine.run()
    engine.check()
    keys = engine.scheduler.offload.stalls.prefixes.by_id[name].block_hashes
    assert len(engine.cache.tier.ready(keys)) == 2  # what is before the failed part
    engine.wipe()
    assert engine.cached_tokens(engine.answer(engine.follow_up(name))) == (0, 32)
    engine.check()


def test_an_upload_that_fails_on_one_of_two_ranks_is_no_hit(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = stalled_elsewhere(engine)
    transfers = engine.cache.transfers
    transfers.world_size = 2
    engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.step()
    (job,) = engine.worker.jobs
    transfers.report(job.id, 1, 0.1, ok=True)
    keys = engine.scheduler.offload.stalls.prefixes.by_id[name].block_hashes
    assert not engine.cache.on_device(keys)
    assert engine.cache.is_busy
    transfers.report(job.id, 1, 0.1, ok=False)
    assert not engine.cache.on_device(keys)
    assert engine.pool.get_num_free_blocks() == 63


# --- the worker's side --------------------------------------------------------------------------------


class BrokenCopier:
    """Fails in everything it is asked."""

    start = pace = finished = drain = close = broken


def worker(**options: Any) -> TokenCakeConnector:
    scheduler = build_scheduler(num_blocks=64, host_blocks=200, **options)
    return TokenCakeConnector(scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config)


def one_step(connector: TokenCakeConnector, *jobs: TransferJob) -> tuple[set[str], set[str], dict[int, bool]]:
    """A step as vLLM's model runner makes it: calls loaded, those whose load failed, how the jobs went."""
    connector.bind_connector_metadata(StepJobs(list(jobs)))
    connector.start_load_kv(SimpleNamespace())
    connector.wait_for_save()
    results = connector.get_transfer_results(set())
    reports = connector.build_connector_worker_meta()
    connector.clear_connector_metadata()
    done = {} if reports is None else {job: ok for job, (_, _, ok) in reports.done.items()}
    return results.finished_recving, results.failed_recving, done


JOBS = (
    TransferJob(1, "store", (1,), (0,)),
    TransferJob(2, "load", (2,), (0,), "r"),
    TransferJob(3, "load", (3,), (0,)),
)


def test_every_hook_of_the_worker_survives_a_broken_copier() -> None:
    connector = worker()
    connector._copier = BrokenCopier()
    assert one_step(connector, *JOBS) == ({"r"}, {"r"}, {1: False, 2: False, 3: False})
    connector.unregister_kv_caches()
    connector.shutdown()


def test_sleep_waits_for_the_copies_and_calls_find_the_same_memory_after_it() -> None:
    connector = worker()
    caches = torch.arange(64.0).reshape(64, 1, 1, 1).repeat(1, 1, 16, 128)
    connector.register_kv_caches({"layer": caches})
    connector.bind_connector_metadata(StepJobs([TransferJob(1, "store", (1,), (0,))]))
    connector.wait_for_save()
    connector.unregister_kv_caches()
    connector.get_transfer_results(set())
    assert connector.build_connector_worker_meta().done[1][2]
    getattr(connector, "restore_kv_caches", lambda: None)()  # vLLM's own, from 0.33 on
    connector.clear_connector_metadata()
    connector.bind_connector_metadata(StepJobs([TransferJob(2, "load", (5,), (0,))]))
    connector.start_load_kv(SimpleNamespace())
    connector.unregister_kv_caches()
    assert torch.equal(caches[5], caches[1])
    connector.shutdown()


def test_without_host_memory_every_job_is_reported_as_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")

    connector = worker()
    monkeypatch.setattr("tokencake_vllm.transfer.block_memory.new_rows", refuse)
    with caplog.at_level(logging.ERROR, "vllm.tokencake"):
        connector.register_kv_caches({"layer": torch.zeros(64, 1, 16, 128)})
    assert isinstance(connector._copier, NoCopier)
    assert one_step(connector, *JOBS) == ({"r"}, {"r"}, {1: False, 2: False, 3: False})


def slots_told(connector: TokenCakeConnector) -> Any:
    connector.bind_connector_metadata(StepJobs())
    report = connector.build_connector_worker_meta()
    return None if report is None else report.slots


def test_a_worker_tells_once_how_much_host_memory_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = worker()
    connector.register_kv_caches({"layer": torch.zeros(64, 1, 16, 128)})
    assert [slots_told(connector), slots_told(connector)] == [(200, 200), None]
    connector.shutdown()
    poor = worker()
    monkeypatch.setattr("tokencake_vllm.transfer.block_memory.new_rows", broken)
    poor.register_kv_caches({"layer": torch.zeros(64, 1, 16, 128)})
    assert slots_told(poor) == (0, 0)


def test_reports_of_ranks_name_the_fewest_and_the_most_slots() -> None:
    joined = StepReports({}, (200, 200)).aggregate(StepReports({})).aggregate(StepReports({}, (100, 100)))
    assert joined.slots == (100, 200)
    assert StepReports({}).aggregate(StepReports({})).slots is None


@pytest.mark.parametrize(("fewest", "most", "words"), [(0, 200, "`time.host_kv_gib` is 64"), (100, 200, "100 to 200")])
def test_the_time_scheduler_is_off_where_the_workers_count_other_slots(
    make_harness: MakeHarness, caplog: pytest.LogCaptureFixture, fewest: int, most: int, words: str
) -> None:
    engine = make_harness()
    name = stalled_elsewhere(engine)
    with caplog.at_level(logging.ERROR, "vllm.tokencake"):
        engine.cache.compare_slots(fewest, most, host_kv_gib=64.0)
    assert words in caplog.text
    assert words in engine.scheduler.tokencake_state(None, None, 10)["time"]["off"]
    follow_up = engine.answer(engine.follow_up(name), expects_tools={"build": 60.0})
    assert engine.cached_tokens(follow_up) == (0, 0)  # nothing is loaded
    assert not engine.cache.is_busy  # and nothing stored
    engine.check()


def test_as_many_slots_on_every_side_leave_the_time_scheduler_on(make_harness: MakeHarness) -> None:
    engine = make_harness()
    engine.cache.compare_slots(200, 200, host_kv_gib=4.0)
    found = engine.scheduler.tokencake_state(None, None, 10)["time"]
    assert found == {"off": None, "host_blocks": 200, "self_check": None}


@pytest.mark.parametrize(
    "job",
    [
        TransferJob(1, "store", (64,), (0,)),
        TransferJob(1, "store", (-1,), (0,)),
        TransferJob(1, "load", (1,), (200,), "r"),
        TransferJob(1, "load", (1,), (-1,)),
        TransferJob(1, "load", (1, 2), (1,)),
        TransferJob(1, "store", (1,), (1, 2)),
        TransferJob(1, "wipe", (64,)),
    ],
)
def test_a_job_with_a_block_that_does_not_exist_never_reaches_the_device(job: TransferJob) -> None:
    connector = worker()
    connector.register_kv_caches({"layer": torch.zeros(64, 1, 16, 128)})
    started: list[TransferJob] = []
    connector._copier.start = started.append
    waiting = {"r"} if job.request else set()
    assert one_step(connector, job) == (waiting, waiting, {1: False})
    assert started == []
    connector.shutdown()


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (Memory(1_000, 1_000), "on a machine or container of 0.0 GiB"),
        (Memory(2**40, 1_000), "asked for by this rank, and 0.0 GiB are available"),
    ],
)
def test_more_host_memory_than_there_is_is_refused_before_it_is_promised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: Memory, words: str
) -> None:
    connector = worker()
    monkeypatch.setattr("tokencake_vllm.transfer.host_memory.host_memory", lambda: memory)
    monkeypatch.setattr("tokencake_vllm.connector.make_copier", broken)  # it is not asked
    with caplog.at_level(logging.ERROR, "vllm.tokencake"):
        connector.register_kv_caches({"layer": torch.zeros(64, 1, 16, 128)})
    assert slots_told(connector) == (0, 0)
    (line,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert words in line
    assert "`time.host_kv_gib` is 4; give it less" in line


def test_the_memory_of_a_container_counts_without_files_that_it_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("max", "current", "stat")]
    monkeypatch.setattr(host_memory, "_CGROUPS", (tuple(map(str, files)),))
    machine = host_memory.host_memory()
    for path, text in zip(files, ("4096\n", "3000\n", "anon 100\nfile 2500\nshmem 500\n"), strict=True):
        path.write_text(text)
    assert host_memory.host_memory() == Memory(4096, 4096 - 3000 + 2000)
    files[0].write_text("max\n")
    assert host_memory.host_memory().total == machine.total


@pytest.mark.parametrize("change", ["is_gone", "is_ready"])
def test_a_host_block_that_left_between_match_and_admission_is_computed(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    engine = make_harness()
    name = stalled_elsewhere(engine)
    match = engine.cache.match

    def match_then_lose(*args: Any) -> Any:
        count = match(*args)
        for _, found in engine.cache._matched.values():
            for block in found:
                setattr(block, change, change == "is_gone")
        return count

    monkeypatch.setattr(engine.cache, "match", match_then_lose)
    follow_up = engine.answer(engine.follow_up(name), reuse="final")
    assert engine.scheduler.registry.calls[follow_up].status == "finished"
    assert engine.count("kv_loads", "gone") == 1
    assert engine.count("kv_loads", "queued") == 0
    assert not engine.count("errors")


def test_a_worker_without_caches_refuses_instead_of_keeping_calls_waiting() -> None:
    connector = worker()
    assert one_step(connector, *JOBS)[1] == {"r"}


def test_a_load_of_nothing_fails() -> None:
    connector = worker()
    connector.register_kv_caches({"layer": torch.zeros(64, 1, 16, 128)})
    assert one_step(connector, TransferJob(0, "load", (), (), "r"))[:2] == ({"r"}, {"r"})
    connector.shutdown()


def test_jobs_of_a_connector_that_is_not_ours_are_nobodys() -> None:
    connector = worker()
    assert connector.get_transfer_results(set()).finished_recving == set()
    connector.start_load_kv(SimpleNamespace())
    assert connector.build_connector_worker_meta() is None


# --- every rank comes to the same ---------------------------------------------------------------------


def test_stages_of_different_length_have_the_same_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = worker()
    config, settings = connector._vllm_config, connector.settings
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    monkeypatch.setattr(config.parallel_config, "world_size", 2)
    monkeypatch.setattr(config.model_config, "get_total_num_hidden_layers", lambda: 5)
    config.kv_transfer_config.kv_connector_extra_config.clear()
    slots = []
    for layers in (2, 3):
        kv_cache_config = connector._kv_cache_config
        kv_cache_config.kv_cache_groups[0].layer_names[:] = [f"layer{number}" for number in range(layers)]
        slots.append(host_slots(config, kv_cache_config, settings))
        page_bytes = kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
        assert block_bytes_of(config, kv_cache_config) == 2 * 3 * page_bytes
    assert slots[0] == slots[1]


def test_unlike_layers_are_judged_and_sized_alike_by_scheduler_and_workers() -> None:
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        MLAAttentionSpec,
        UniformTypeKVCacheSpecs,
    )

    connector = worker()
    vllm_config, settings = connector._vllm_config, connector.settings
    vllm_config.kv_transfer_config.kv_connector_extra_config.clear()
    wide = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
    narrow = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    latent = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)

    def sides(**layers: Any) -> tuple[Any, Any]:
        spec = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=layers)
        size = 64 * sum(each.page_size_bytes for each in layers.values())
        tensors = [
            KVCacheTensor(
                size=size, layers=[name], layer_stride=64 * each.page_size_bytes, block_stride=each.page_size_bytes
            )
            for name, each in layers.items()
        ]
        of_worker = KVCacheConfig(64, tensors, [KVCacheGroupSpec(list(layers), spec)])
        return generate_scheduler_kv_cache_config([of_worker]), of_worker

    of_scheduler, of_worker = sides(main=wide, draft=narrow)
    assert unsupported_reason(vllm_config, of_scheduler) is unsupported_reason(vllm_config, of_worker) is None
    expected = wide.page_size_bytes + narrow.page_size_bytes
    assert block_bytes_of(vllm_config, of_scheduler) == block_bytes_of(vllm_config, of_worker) == expected
    assert host_slots(vllm_config, of_scheduler, settings) == host_slots(vllm_config, of_worker, settings)
    _, of_worker = sides(main=wide, other=latent)
    assert "MLAAttentionSpec" in (unsupported_reason(vllm_config, of_worker) or "")


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_with_context_parallelism_the_time_scheduler_stays_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    connector = worker()
    assert unsupported_reason(connector._vllm_config, connector._kv_cache_config) is None
    monkeypatch.setattr(connector._vllm_config.parallel_config, name, 2)
    assert unsupported_reason(connector._vllm_config, connector._kv_cache_config) is not None
