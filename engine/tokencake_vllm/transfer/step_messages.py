"""What travels with each step between the two sides of the connector: jobs to the workers, reports from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from tokencake_vllm.transfer.jobs import TransferJob
from tokencake_vllm.transfer.self_check import SelfCheck

NOOP_LOAD: Final = 0
"""The id of a load that copies nothing: the worker reports it as failed, and the call that waits computes."""


@dataclass(slots=True)
class StepJobs(KVConnectorMetadata):
    """The copies that begin with a step."""

    jobs: list[TransferJob] = field(default_factory=list)
    urgent: tuple[int, ...] = ()
    """Copies begun earlier for which a call waits by now."""
    is_computing: bool = False


@dataclass(slots=True)
class StepReports(KVConnectorWorkerMetadata):
    """What workers are through with: job id -> ranks, seconds of the slowest, all well?"""

    done: dict[int, tuple[int, float, bool]] = field(default_factory=dict)
    slots: tuple[int, int] | None = None
    """The fewest and the most slots of host memory that a rank has; told once."""
    self_check: SelfCheck | None = None
    """Of the rank with a problem, or of the slowest one; told with `slots`."""
    mismatches: tuple[int, ...] = ()
    """Ids of the jobs that failed because a checksum differed."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both, added up by job."""
        if not isinstance(other, StepReports):
            raise TypeError(f"reports of TokenCake cannot be joined with {type(other).__name__}")
        joined = dict(self.done)
        for job_id, (ranks, seconds, ok) in other.done.items():
            have_ranks, have_seconds, have_ok = joined.get(job_id, (0, 0.0, True))
            joined[job_id] = (have_ranks + ranks, max(have_seconds, seconds), have_ok and ok)
        slots = [count for report in (self, other) for count in report.slots or ()]
        checks = [report.self_check for report in (self, other) if report.self_check is not None]
        return StepReports(
            joined,
            (min(slots), max(slots)) if slots else None,
            max(checks, key=lambda check: (check.problem is not None, check.seconds), default=None),
            self.mismatches + other.mismatches,
        )
