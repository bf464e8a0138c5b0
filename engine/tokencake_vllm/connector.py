"""KV connector of vLLM: a thin shell around `HostCache` on the scheduler's side and a `Copier` on the workers'.

The scheduler's instance hands jobs to the workers with every step and takes their reports; `time_scheduler` decides
what is copied and when. Nothing raises into vLLM: an error on either side is logged, and the request computes what it
needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from tokencake.forecast.costs import CostModel
from tokencake.settings import section
from tokencake.time_scheduler.host_tier import HostTier
from tokencake.time_scheduler.settings import TimeSettings
from tokencake_vllm.component import ErrorContainment
from tokencake_vllm.transfer.block_memory import block_views
from tokencake_vllm.transfer.copier import make_copier
from tokencake_vllm.transfer.host_cache import HostCache
from tokencake_vllm.transfer.host_memory import shortage
from tokencake_vllm.transfer.host_size import block_bytes_of, host_slots, unsupported_reason
from tokencake_vllm.transfer.jobs import Copier, NoCopier, TransferJob, TransferResult
from tokencake_vllm.transfer.self_check import SelfCheck, self_check
from tokencake_vllm.transfer.step_messages import NOOP_LOAD, StepJobs, StepReports

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.tokencake")

KVTransferParams = dict[str, Any] | None


class TokenCakeConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector that `--kv-transfer-config` names; `tokencake engine` adds it."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.settings = section(vllm_config.additional_config, "time", TimeSettings)
        self.on_finished: Callable[[Request], KVTransferParams] | None = None
        """Set by `TimeComponent`: decides what becomes of a finished request's KV; returns what its client is told."""
        self.cache: HostCache | None = None
        self._contain_errors = ErrorContainment(self._count_error)
        self._block_tokens = vllm_config.cache_config.block_size
        self._copier: Copier = NoCopier()
        self._noop_loads: list[str] = []
        """Requests that wait for a load that could not be queued."""
        self._not_loading_again: set[str] = set()
        """Requests that ask for no load any more, after such a one."""
        self._failed_loads: set[str] = set()
        self._loaded: set[str] = set()
        self._reports: dict[int, tuple[int, float, bool]] = {}
        self._slots = 0
        """Blocks that this worker's host memory holds."""
        self._self_check: SelfCheck | None = None
        self._mismatches: tuple[int, ...] = ()
        self._tells_slots = False
        # A failed load must cost time, not the request. vLLM reads this after the connector was made.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        if role == KVConnectorRole.SCHEDULER and self.settings.enabled and (problem := self._unsupported_reason()):
            logger.warning("TokenCake: the Time Scheduler stays off: %s", problem)

    @property
    def is_on(self) -> bool:
        """Whether KV is moved, with this model and these settings."""
        return self.settings.enabled and self._unsupported_reason() is None

    @property
    def off_reason(self) -> str | None:
        """Why no KV is moved, or None."""
        return self._unsupported_reason() if self.settings.enabled else "the setting time.enabled is false"

    def _unsupported_reason(self) -> str | None:
        return unsupported_reason(self._vllm_config, self._kv_cache_config)

    def _count_error(self) -> None:
        if self.cache is not None:
            self.cache.count(("errors",), 1)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: what was not stored is computed again."""
        return False

    # --- scheduler side -------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Called by vLLM's scheduler once its block pool exists."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if not self.is_on:
            return
        block_bytes = block_bytes_of(self._vllm_config, self._kv_cache_config)
        self.cache = HostCache(
            tier=HostTier(host_slots(self._vllm_config, self._kv_cache_config, self.settings)),
            pool=kv_cache_manager.block_pool,
            costs=CostModel(block_bytes, self._block_tokens),
            world_size=self._vllm_config.parallel_config.world_size,
            job_blocks=max(1, int(self.settings.job_mib * 2**20 / block_bytes)),
            clock=lambda: time.monotonic(),  # noqa: PLW0108  # the simulator lends this module another clock
        )

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that the host holds behind those on the device; None while another copy is bringing them."""
        count: int | None = 0
        with self._contain_errors:
            if self.cache is not None and request.request_id not in self._not_loading_again:
                first = num_computed_tokens // self._block_tokens
                last = (request.num_tokens - 1) // self._block_tokens
                count = self.cache.match(request.request_id, request.block_hashes[:last], first)
        return (None, False) if count is None else (count * self._block_tokens, bool(count))

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has got its blocks: queue the load."""
        if self.cache is None:
            return
        is_queued = False
        with self._contain_errors:
            count = num_external_tokens // self._block_tokens
            device_ids = blocks.get_block_ids()[0] if count else ()
            is_queued = self.cache.admit(request.request_id, request.block_hashes, device_ids, count)
        if num_external_tokens and not is_queued:
            self._noop_loads.append(request.request_id)
            self._not_loading_again.add(request.request_id)

    def request_finished_all_groups(
        self,
        request: Request,
        block_ids: tuple[list[int], ...],  # noqa: ARG002  # vLLM's signature
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never delays the freeing of blocks: a copy pins those that it needs."""
        params = None
        self._not_loading_again.discard(request.request_id)
        with self._contain_errors:
            if self.cache is not None:
                self.cache.forget_match(request.request_id)
            if self.on_finished is not None:
                params = self.on_finished(request)
        return False, params

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Jobs queued since the last step."""
        if self.cache is None:
            return StepJobs()
        jobs, urgent = self.cache.transfers.drain_jobs()
        lost, self._noop_loads = self._noop_loads, []
        jobs += [TransferJob(NOOP_LOAD, "load", (), request=name) for name in lost]
        return StepJobs(jobs, urgent, is_computing=scheduler_output.total_num_scheduled_tokens > 0)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in the workers' reports."""
        reports = connector_output.kv_connector_worker_meta
        if self.cache is not None and isinstance(reports, StepReports):
            if reports.slots is not None:
                with self._contain_errors:
                    self.cache.take_self_check(reports.self_check)
                    self.cache.compare_slots(*reports.slots, host_kv_gib=self.settings.host_kv_gib)
            with self._contain_errors:
                self.cache.take_mismatches(reports.mismatches)
            for job_id, (ranks, seconds, ok) in reports.done.items():
                with self._contain_errors:
                    self.cache.transfers.report(job_id, ranks, seconds, ok=ok)

    def has_pending_push_work(self) -> bool:
        """Whether a copy is under way, for which the engine must go on stepping."""
        return self.cache is not None and self.cache.is_busy

    def has_pending_block_frees(self) -> bool:
        """Whether copies hold blocks, for which vLLM waits before it preempts."""
        return self.cache is not None and self.cache.holds_blocks

    def reset_cache(self) -> bool | None:
        """Forget all blocks on the host."""
        with self._contain_errors:
            if self.cache is not None:
                self.cache.reset()
        return True

    # --- worker side ------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Allocate the host memory, once."""
        with self._contain_errors:
            if self.settings.enabled:
                self._slots = self._make_copier(kv_caches)
            self._tells_slots = True

    def _make_copier(self, kv_caches: dict[str, torch.Tensor]) -> int:
        """Allocate host memory and start the copier; returns how many blocks the memory holds."""
        if self._unsupported_reason() is not None:
            return 0
        slots = host_slots(self._vllm_config, self._kv_cache_config, self.settings)
        parallel = self._vllm_config.parallel_config
        engine_bytes = slots * block_bytes_of(self._vllm_config, self._kv_cache_config)
        problem = shortage(engine_bytes // parallel.world_size, engine_bytes // parallel.nnodes_within_dp)
        if problem is not None:
            gib = self.settings.host_kv_gib
            logger.error(
                "TokenCake: no host memory: %s. `time.host_kv_gib` is %g; give it less, or the machine more",
                problem,
                gib,
            )
            return 0
        every = 1 if self.settings.debug_checksums else self.settings.checksum_every
        self._copier = make_copier(kv_caches, self._kv_cache_config.num_blocks, slots, checksum_every=every)
        if isinstance(self._copier, NoCopier):
            return 0
        views = block_views(kv_caches, self._kv_cache_config.num_blocks)
        self._self_check = check = self_check(self._copier, views, slots)
        if check.problem is not None:
            logger.error("TokenCake: the self-check of the copies failed: %s", check.problem)
            self._copier.close()
            self._copier = NoCopier()
            return 0
        return slots

    def unregister_kv_caches(self) -> None:
        """End all copies: sleep is about to take the device's memory (from vLLM 0.33 on), which comes back in place."""
        with self._contain_errors:
            self._copier.drain()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Tell the copier what the step computes and which jobs are urgent."""
        super().bind_connector_metadata(connector_metadata)
        with self._contain_errors:
            if isinstance(connector_metadata, StepJobs):
                self._copier.pace(is_computing=connector_metadata.is_computing, urgent=connector_metadata.urgent)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ARG002  # vLLM's signature
        """Start the loads of this step."""
        self._start(is_store=False)

    def wait_for_save(self) -> None:
        """Start the stores of this step, after its computation."""
        self._start(is_store=True)

    def _start(self, *, is_store: bool) -> None:
        metadata = self._connector_metadata
        for job in metadata.jobs if isinstance(metadata, StepJobs) else ():
            if (job.kind == "store") == is_store:
                is_begun = False
                with self._contain_errors:
                    if job.id != NOOP_LOAD and self._is_in_range(job):
                        self._copier.start(job)
                        is_begun = True
                if not is_begun:
                    self._record(TransferResult(job, 0.0, ok=False))

    def _is_in_range(self, job: TransferJob) -> bool:
        """Whether its blocks and slots exist: a kernel that is given others would end the device's context."""
        blocks = self._kv_cache_config.num_blocks
        is_in_range = (
            all(0 <= block < blocks for block in job.blocks)
            and all(0 <= slot < self._slots for slot in job.slots)
            and len(job.slots) == (0 if job.kind == "wipe" else len(job.blocks))
        )
        if not is_in_range:
            logger.error(
                "TokenCake: a %s of %d blocks (%d to %d) and %d slots is refused; there are %d blocks and %d slots",
                *(job.kind, len(job.blocks), min(job.blocks, default=0), max(job.blocks, default=0)),
                *(len(job.slots), blocks, self._slots),
            )
        return is_in_range

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002  # vLLM's
        """Requests whose load has ended, and those of them whose load failed."""
        with self._contain_errors:
            for done in self._copier.finished():
                self._record(done)
        results = KVConnectorTransferResults(
            finished_recving=self._loaded | self._failed_loads, failed_recving=self._failed_loads
        )
        self._loaded, self._failed_loads = set(), set()
        return results

    def _record(self, done: TransferResult) -> None:
        self._reports[done.job.id] = (1, done.seconds, done.ok)
        if done.is_mismatch:
            self._mismatches += (done.job.id,)
        if done.job.request is not None:
            (self._loaded if done.ok else self._failed_loads).add(done.job.request)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Reports of the jobs that ended."""
        reports, self._reports = self._reports, {}
        slots, check = ((self._slots, self._slots), self._self_check) if self._tells_slots else (None, None)
        self._tells_slots = False
        mismatches, self._mismatches = self._mismatches, ()
        return StepReports(reports, slots, check, mismatches) if reports or slots else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request starts only when its whole load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing: blocks are stored when their request has ended."""

    def shutdown(self) -> None:
        """Stop the copier."""
        with self._contain_errors:
            self._copier.close()
