"""KV blocks of the device by state: one account over both schedulers and vLLM, which adds up to the pool.

Every block is in one state. Where several would do, as with a prefix that a running call and a pinned prefix share, the
first in the list counts, since only when that is over the block could go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.request import RequestStatus

from tokencake_vllm.vllm_adapter.requests import leaving_blocks

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

STATES: Final = ("running", "loading", "leaving", "pinned", "uploading", "storing", "cached", "empty")
"""In words:

running:    of calls in the engine, those of a streaming session between two inputs included
loading:    of calls whose prefix is on its way from the host
leaving:    of calls that have ended, until the step under way is over
pinned:     held for a stalled agent
uploading:  held by a copy that fills them before a call comes
storing:    held by a copy to the host, their call being over
cached:     free, and a prefix hit until it is given away
empty:      free
"""

OWN_STATES: Final = ("running", "loading", "leaving", "pinned")
"""States of blocks that belong to one tenant."""


def own_blocks(
    scheduler: Scheduler, pinned: Iterable[Iterable[KVCacheBlock]], is_own: Callable[[str], bool]
) -> dict[str, int]:
    """Blocks of one tenant by state: what it may know of the device.

    Args:
        scheduler: vLLM's.
        pinned: blocks held for each of the tenant's stalled prefixes.
        is_own: whether a request, by its id, is the tenant's.
    """
    state_of = {block.block_id: "pinned" for block in chain.from_iterable(pinned)}
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        for name, blocks in manager.req_to_blocks.items():
            request = scheduler.requests.get(name)
            if request is not None and is_own(name):
                state_of.update((block.block_id, _state_of(request)) for block in blocks if not block.is_null)
    counts = Counter(state_of.values())
    return {state: counts[state] for state in OWN_STATES}


def block_budget(scheduler: Scheduler, pinned: Mapping[str, Iterable[KVCacheBlock]]) -> dict[str, int]:
    """Blocks by state, without the null block. It looks at every block: for a scrape, not for a step.

    Args:
        scheduler: vLLM's.
        pinned: blocks held for each stalled prefix.
    """
    state_of = {block.block_id: "pinned" for block in chain.from_iterable(pinned.values())}
    state_of.update((block.block_id, "leaving") for block in leaving_blocks(scheduler))
    calls: dict[str, list[KVCacheBlock]] = {"leaving": [], "loading": [], "running": []}
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        for name, blocks in manager.req_to_blocks.items():
            calls[_state_of(scheduler.requests.get(name))] += blocks
    for state, blocks in calls.items():
        state_of.update((block.block_id, state) for block in blocks)

    counts = dict.fromkeys(STATES, 0)
    for block in scheduler.kv_cache_manager.block_pool.blocks:
        if not block.is_null:
            counts[state_of.get(block.block_id, _unclaimed(block)) if block.ref_cnt else _free(block)] += 1
    return counts


def _state_of(request: Any) -> str:
    if request is None or request.is_finished():
        return "leaving"
    return "loading" if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS else "running"


def _unclaimed(block: KVCacheBlock) -> str:
    """A block that only a copy holds: it gets its hash when it is filled, so one with a hash is on its way out."""
    return "uploading" if block.block_hash is None else "storing"


def _free(block: KVCacheBlock) -> str:
    return "empty" if block.block_hash is None else "cached"
