"""Which state each block of the device is in, from a pool and tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import RequestStatus

from tests.unit.vllm.vllm_adapter.pools import Device, keys
from tokencake_vllm.vllm_adapter.block_accounting import block_budget, own_blocks


def scheduler_of(device: Device, leaving: list[KVCacheBlock] | None = None) -> Any:
    return SimpleNamespace(
        kv_cache_manager=device.manager, requests=device.requests, deferred_frees=[(1, leaving or [])]
    )


def budget(device: Device, pinned: list[KVCacheBlock] | None = None, **rest: Any) -> dict[str, int]:
    found = block_budget(scheduler_of(device, **rest), {"c": pinned or []})
    assert sum(found.values()) == device.pool.num_gpu_blocks - 1
    return {state: count for state, count in found.items() if count}


def test_an_idle_device_is_empty() -> None:
    assert budget(Device(20)) == {"empty": 20}


def test_free_blocks_are_cached_or_empty_and_held_ones_without_an_owner_copied_in_or_out() -> None:
    device = Device(20)
    device.take(keys("free", 2), free=True)
    device.take(keys("stored", 3))
    device.pool.get_new_blocks(4)

    assert budget(device) == {"cached": 2, "storing": 3, "uploading": 4, "empty": 11}


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (RequestStatus.RUNNING, "running"),
        (RequestStatus.WAITING, "running"),
        (RequestStatus.WAITING_FOR_REMOTE_KVS, "loading"),
        (RequestStatus.FINISHED_STOPPED, "leaving"),
    ],
)
def test_blocks_of_a_request_are_in_its_state(status: Any, state: str) -> None:
    device = Device(20)
    device.hold("r", device.take(keys("k", 3)), status)

    assert budget(device) == {state: 3, "empty": 17}


def test_blocks_of_a_request_that_is_gone_are_leaving() -> None:
    device = Device(20)
    device.hold("r", device.take(keys("k", 3)))
    del device.requests["r"]

    assert budget(device, leaving=device.take(keys("m", 2))) == {"leaving": 5, "empty": 15}


def test_the_state_that_lasts_longest_counts() -> None:
    device = Device(20)
    blocks = device.take(keys("k", 5))
    device.hold("gone", blocks[:3], RequestStatus.FINISHED_STOPPED)
    device.hold("loads", blocks[:2], RequestStatus.WAITING_FOR_REMOTE_KVS)
    device.hold("runs", blocks[:1])

    assert budget(device, pinned=blocks[:4], leaving=blocks[3:]) == {
        "running": 1,
        "loading": 1,
        "leaving": 3,
        "empty": 15,
    }
    assert budget(device, pinned=blocks) == {"running": 1, "loading": 1, "leaving": 1, "pinned": 2, "empty": 15}


def test_a_tenant_is_told_of_its_own_blocks_only() -> None:
    device = Device(20)
    mine, theirs, pinned = device.take(keys("m", 3)), device.take(keys("t", 4)), device.take(keys("p", 2))
    device.hold("mine", [device.pool.null_block, *mine])
    device.hold("mine too", theirs[:1], RequestStatus.WAITING_FOR_REMOTE_KVS)
    device.hold("theirs", theirs)
    device.hold("gone", theirs)
    del device.requests["gone"]

    def own(name: str) -> bool:
        return name.startswith(("mine", "gone"))

    found = own_blocks(scheduler_of(device), [pinned, mine[:1]], own)
    assert found == {"running": 3, "loading": 1, "leaving": 0, "pinned": 2}
