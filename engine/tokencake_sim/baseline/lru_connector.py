"""KV connector of the baseline: stores what finishes, loads on a hit, evicts the least recently used block.

The scheduler side of an offloading connector in the manner of vLLM's own: asynchronous loads attached to the call
that wants them, and a call whose prefix another call is loading waits for that load instead of repeating it. The
worker side is modelled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from tokencake_sim.baseline.lru_cache import LruHostCache
from tokencake_sim.baseline.lru_worker import LruStepJobs, LruStepReports

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class _Store:
    keys: list[BlockHash]
    blocks: list[KVCacheBlock]


class LruOffloadConnector(KVConnectorBase_V1, SupportsHMA):
    """Scheduler side of the tier. Extra configuration: `host_blocks`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self.host = LruHostCache(int(extra["host_blocks"]))
        self.counts: Counter[str] = Counter()
        self._block_tokens = vllm_config.cache_config.block_size
        self._requests: dict[str, Request] = {}
        self._matched: dict[str, int] = {}
        self._loading: dict[str, list[BlockHash]] = {}
        self._keys_loading: Counter[BlockHash] = Counter()
        self._stores: dict[int, _Store] = {}
        self._store_ids = 0
        self._next = LruStepJobs()
        self._manager: KVCacheManager | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is recomputed."""
        return False

    @property
    def manager(self) -> KVCacheManager:
        """The block manager of vLLM, bound after construction."""
        if self._manager is None:
            raise RuntimeError("HostTier was used before bind_kv_cache_manager")
        return self._manager

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Called by the scheduler once."""
        self._manager = kv_cache_manager

    def on_new_request(self, request: Request) -> None:
        """Called by the scheduler for every call."""
        self._requests[request.request_id] = request

    # --- load on hit --------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens of the prompt that the host holds beyond those on the device; None while another call loads them."""
        first = num_computed_tokens // self._block_tokens
        last = (request.num_tokens - 1) // self._block_tokens
        keys = []
        for key in request.block_hashes[first:last]:
            if not self.host.has(key):
                break
            keys.append(key)
        if keys and keys[0] in self._keys_loading:
            self.counts["coalesced_waits"] += 1
            return None, False
        self._matched[request.request_id] = first
        return len(keys) * self._block_tokens, bool(keys)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The scheduler has made room: queue the load."""
        del blocks
        if not num_external_tokens:
            return
        first = self._matched.pop(request.request_id)
        keys = list(request.block_hashes[first : first + num_external_tokens // self._block_tokens])
        self.host.touch(request.block_hashes[: first + len(keys)])
        self.host.pin(keys)
        self._loading[request.request_id] = keys
        self._keys_loading.update(keys)
        self._next.to_device.append((request.request_id, len(keys)))
        self.counts["loads"] += 1
        self.counts["loaded_blocks"] += len(keys)

    # --- store at finish and at preemption ------------------------------------------------------------

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Store the full blocks that are surely computed; steps still under way write only behind them."""
        del block_ids
        del self._requests[request.request_id]
        computed = (request.num_computed_tokens - request.num_in_flight_tokens) // self._block_tokens
        blocks = self.manager.coordinator.get_blocks(request.request_id)[0][:computed]
        self._store(list(request.block_hashes[: len(blocks)]), list(blocks))
        return False, None

    def _store_preempted(self, request: Request) -> None:
        find = self.manager.block_pool.get_cached_block
        keys, blocks = [], []
        for key in request.block_hashes:
            cached = find(key, [0])
            if not cached:
                break
            keys.append(key)
            blocks.append(cached[0])
        self._store(keys, blocks)

    def _store(self, keys: list[BlockHash], blocks: list[KVCacheBlock]) -> None:
        self.host.touch(keys)
        wanted = [(key, block) for key, block in zip(keys, blocks, strict=True) if not self.host.is_known(key)]
        wanted = wanted[: self.host.reserve([key for key, _ in wanted])]
        if not wanted:
            return
        store = _Store([key for key, _ in wanted], [block for _, block in wanted])
        # Held until the copy is done; what is shared with a running call only gets one reference more.
        self.manager.block_pool.touch(store.blocks)
        self._store_ids += 1
        self._stores[self._store_ids] = store
        self._next.to_host.append((self._store_ids, len(store.keys)))
        self.counts["stores"] += 1
        self.counts["stored_blocks"] += len(store.keys)

    # --- the step -------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Hand the queued jobs to the worker."""
        for name in sorted(scheduler_output.preempted_req_ids or ()):
            if name in self._requests:
                self._store_preempted(self._requests[name])
        jobs, self._next = self._next, LruStepJobs()
        return jobs

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take what the worker has finished."""
        for name in connector_output.finished_recving or ():
            keys = self._loading.pop(name)
            self.host.unpin(keys)
            self._keys_loading -= Counter(keys)
        if isinstance(connector_output.kv_connector_worker_meta, LruStepReports):
            for job in connector_output.kv_connector_worker_meta.jobs:
                store = self._stores.pop(job)
                self.host.arrive(store.keys)
                self.host.unpin(store.keys)
                self.manager.block_pool.free_blocks(reversed(store.blocks))

    def has_pending_push_work(self) -> bool:
        """Keep the engine stepping while copies to the host are under way."""
        return bool(self._stores)

    def has_pending_block_frees(self) -> bool:
        """Let the scheduler wait for these blocks rather than preempt."""
        return bool(self._stores)

    # --- the worker side is modelled ------------------------------------------------------------------

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Never called: `LruTransferModel` stands for it."""
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Never called, as above."""
        raise NotImplementedError

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Never called, as above."""
        raise NotImplementedError

    def wait_for_save(self) -> None:
        """Never called, as above."""
        raise NotImplementedError
