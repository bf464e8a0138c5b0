"""Modelled workers: the worker side of a KV connector where there is no device.

The engine hands it the connector's metadata with every step, exactly as vLLM does, and takes back what has been
finished since. A copy takes bytes / bandwidth, waits for those before it in its direction, and runs beside the
computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.v1.outputs import KVConnectorOutput


class Worker(Protocol):
    """The modelled worker of one connector."""

    def start(self, metadata: KVConnectorMetadata | None, now_s: float, computed_s: float) -> None:
        """Take the jobs of a step that is dispatched now; what earlier steps write is complete at `computed_s`."""

    def finished(self, now_s: float) -> KVConnectorOutput | None:
        """What was completed by `now_s` and has not been reported yet."""

    @property
    def next_s(self) -> float | None:
        """When the next unreported job is done; None where there is none."""


class NoWorker:
    """The worker of an engine without a connector."""

    next_s: float | None = None

    def start(self, metadata: KVConnectorMetadata | None, now_s: float, computed_s: float) -> None:
        """Nothing to do."""

    def finished(self, now_s: float) -> KVConnectorOutput | None:
        """Never anything."""
        del now_s
        return None


@dataclass(slots=True)
class Link:
    """One direction between device and host: a queue served at a constant rate."""

    bytes_per_s: float
    free_at_s: float = 0.0
    copied_bytes: float = 0.0
    busy_s: float = 0.0
    jobs: int = 0

    def copy(self, size_bytes: float, ready_s: float) -> float:
        """Queue a copy whose source is ready at `ready_s`; returns when it is done."""
        taken_s = size_bytes / self.bytes_per_s
        self.free_at_s = max(self.free_at_s, ready_s) + taken_s
        self.copied_bytes += size_bytes
        self.busy_s += taken_s
        self.jobs += 1
        return self.free_at_s


@dataclass(slots=True)
class Links:
    """Both directions."""

    to_host: Link
    to_device: Link

    @classmethod
    def of(cls, bytes_per_s: float) -> Links:
        """Two idle directions of the same speed."""
        return cls(Link(bytes_per_s), Link(bytes_per_s))
