"""Modelled worker of the Time Scheduler's connector: it times copies and reports those that are done."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from vllm.v1.outputs import KVConnectorOutput

from tokencake_vllm.transfer.step_messages import StepJobs, StepReports

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

    from tokencake_sim.device.worker import Links
    from tokencake_vllm.transfer.jobs import TransferJob


class TransferModel:
    """Obeys the jobs of `TokenCakeConnector` as its copier would."""

    def __init__(self, links: Links, block_bytes: int) -> None:
        self._links = links
        self._block_bytes = block_bytes
        self._done: list[tuple[float, int, TransferJob, float]] = []

    def start(self, metadata: KVConnectorMetadata | None, now_s: float, computed_s: float) -> None:
        """Queue the jobs of a step; a store reads what earlier steps write, a load starts at once."""
        for job in metadata.jobs if isinstance(metadata, StepJobs) else ():
            size = len(job.blocks) * self._block_bytes
            is_store = job.kind == "store"
            link = self._links.to_host if is_store else self._links.to_device
            done_s = link.copy(size, computed_s if is_store else now_s)
            heapq.heappush(self._done, (done_s, job.id, job, size / link.bytes_per_s))

    def finished(self, now_s: float) -> KVConnectorOutput | None:
        """Jobs done by `now_s`."""
        reports = StepReports()
        calls: set[str] = set()
        while self._done and self._done[0][0] <= now_s:
            _, _, job, seconds = heapq.heappop(self._done)
            reports.done[job.id] = (1, seconds, True)
            if job.request is not None:
                calls.add(job.request)
        if not reports.done:
            return None
        return KVConnectorOutput(finished_recving=calls or None, kv_connector_worker_meta=reports)

    @property
    def next_s(self) -> float | None:
        """When the next job is done."""
        return self._done[0][0] if self._done else None
