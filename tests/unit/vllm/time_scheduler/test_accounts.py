"""What offloads brought: blocks read back, spared or wasted, and the room that stalled calls left to others."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.harness.kv_worker import PROMPT, MakeHarness, SchedulerHarness
from tokencake import protocol
from tokencake.registry.metric_names import COUNTERS

OTHER = [900 + place for place in range(100)]


def offloads(engine: SchedulerHarness) -> dict[str, float]:
    names = ("stored", "used", "spare", "wasted")
    return {name: count for name in names if (count := engine.count("kv_offloads", name))}


def test_blocks_that_a_call_loads_were_used_once(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall(out_degree=2)
    for more in (20, 30):
        engine.wipe()
        engine.answer(engine.follow_up(name, more), reuse="final", fan_out=2)
    assert offloads(engine) == {"stored": 6, "used": 6}


def test_blocks_that_an_upload_brings_were_used(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.wipe()
    engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.run()
    assert offloads(engine) == {"stored": 6, "used": 6}


def test_blocks_evicted_after_a_hit_on_the_device_were_spare(make_harness: MakeHarness) -> None:
    engine = make_harness(host_blocks=6)
    name = engine.long_stall()
    engine.answer(engine.follow_up(name), reuse="final")  # all of it is still on the device
    engine.long_stall(OTHER, session="t")
    assert offloads(engine) == {"stored": 12, "spare": 6}


def test_blocks_evicted_before_anybody_came_were_wasted(make_harness: MakeHarness) -> None:
    engine = make_harness(host_blocks=6)
    engine.long_stall()
    engine.send(protocol.SessionEnd("s"))
    engine.long_stall(OTHER, session="t")
    assert offloads(engine) == {"stored": 12, "wasted": 6}


def test_freed_block_seconds_end_with_the_next_call(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.clock.now += 10.0
    engine.answer(engine.follow_up(name), reuse="final")
    assert engine.count("kv_freed_block_seconds") == pytest.approx(60.0, rel=0.02)


def test_freed_block_seconds_end_with_the_upload(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.long_stall()
    engine.wipe()
    engine.clock.now += 5.0
    engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=60.0))
    engine.run()
    engine.clock.now += 100.0
    engine.answer(engine.follow_up(name), reuse="final")
    assert engine.count("kv_freed_block_seconds") == pytest.approx(30.0, rel=0.05)


def test_a_call_kept_on_the_device_frees_nothing(make_harness: MakeHarness) -> None:
    engine = make_harness()
    name = engine.answer(PROMPT, expects_tools={"ls": 0.02}, reuse="extends")
    engine.clock.now += 0.1
    engine.answer(engine.follow_up(name), reuse="final")
    assert engine.count("kv_freed_block_seconds") == 0


def test_every_counter_of_a_run_is_known_to_metrics(make_harness: MakeHarness) -> None:
    engine = make_harness(host_blocks=6, num_blocks=24)
    for number in range(3):
        name = engine.long_stall([1_000 * number + place for place in range(100)], session=f"s{number}")
    engine.wipe()
    engine.answer(engine.follow_up(name))
    for (counter, *labels), _ in engine.scheduler.tokencake_metrics()["counts"]:
        assert len(labels) == len(COUNTERS[counter][1])
