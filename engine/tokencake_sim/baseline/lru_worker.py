"""Modelled worker of the baseline's connector: it times copies and reports those that are done."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from vllm.v1.outputs import KVConnectorOutput

if TYPE_CHECKING:
    from tokencake_sim.device.worker import Links


@dataclass(slots=True)
class LruStepJobs(KVConnectorMetadata):
    """Jobs of one step: id and number of blocks."""

    to_host: list[tuple[int, int]] = field(default_factory=list)
    to_device: list[tuple[str, int]] = field(default_factory=list)
    """By the id of the call that waits for it."""


@dataclass(slots=True)
class LruStepReports(KVConnectorWorkerMetadata):
    """Jobs to the host that are done."""

    jobs: list[int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """There is one worker only."""
        raise NotImplementedError(f"one modelled worker cannot be joined with {other}")


class LruTransferModel:
    """Times the copies of `LruOffloadConnector`."""

    def __init__(self, links: Links, block_bytes: int) -> None:
        self._links = links
        self._block_bytes = block_bytes
        self._done: list[tuple[float, int, int | str]] = []
        self._jobs = 0

    def start(self, metadata: KVConnectorMetadata | None, now_s: float, computed_s: float) -> None:
        """Queue the jobs of a step; a copy to the host reads what earlier steps write, one from it starts at once."""
        if not isinstance(metadata, LruStepJobs):
            return
        for store, blocks in metadata.to_host:
            self._finish_at(self._links.to_host.copy(blocks * self._block_bytes, computed_s), store)
        for name, blocks in metadata.to_device:
            self._finish_at(self._links.to_device.copy(blocks * self._block_bytes, now_s), name)

    def _finish_at(self, time_s: float, job: int | str) -> None:
        self._jobs += 1
        heapq.heappush(self._done, (time_s, self._jobs, job))

    def finished(self, now_s: float) -> KVConnectorOutput | None:
        """Jobs done by `now_s`."""
        loads: set[str] = set()
        stores: list[int] = []
        while self._done and self._done[0][0] <= now_s:
            _, _, job = heapq.heappop(self._done)
            if isinstance(job, str):
                loads.add(job)
            else:
                stores.append(job)
        if not loads and not stores:
            return None
        return KVConnectorOutput(
            finished_recving=loads or None, kv_connector_worker_meta=LruStepReports(stores) if stores else None
        )

    @property
    def next_s(self) -> float | None:
        """When the next job is done."""
        return self._done[0][0] if self._done else None
