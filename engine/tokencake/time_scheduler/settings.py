"""Settings of the Time Scheduler: the section `time` of `--additional-config '{"tokencake": {"time": {...}}}'`.

All but those in `PUBLIC` stand under `advanced`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokencake.protocol.parsing import count, flag, number, optional, text


@dataclass(frozen=True, slots=True)
class TimeSettings:
    """The section `time`. Where a default has a source, it is named."""

    PUBLIC: ClassVar = frozenset({"enabled", "policy", "host_kv_gib", "upload", "forecast_file"})

    enabled: bool = optional(flag, True)
    """False: stock vLLM. Default true."""
    policy: str = optional(text(), "default")
    """A name in `tokencake.policies.registry.OFFLOAD`. `paper`: Algorithm 1 and the score with its constants."""
    host_kv_gib: float = optional(number(0, 16_384), 4.0)
    """Host memory for KV, GiB over all ranks of one engine, allocated once at the start. Default 4."""
    upload: bool = optional(flag, True)
    """Upload before the agent is back. False: load when the call comes. Default true."""
    forecast_file: str | None = optional(text(4_096))
    """Where the learned durations are kept across restarts. Default: nowhere."""

    eviction: str = optional(text(), "next_use")
    """What leaves a full host: a name in `tokencake.policies.registry.EVICTION`. Default `next_use`; or `lru`."""
    keep_share: float = optional(number(0, 0.9), 0.3)
    """At most this share of the device's blocks is pinned for short stalls. Default 0.3; pins are given up before a
    request has to wait for them."""
    short_stall_s: float = optional(number(0, 3_600), 0.2)
    """A gap that is probably shorter, queueing included, is never copied. Seconds, default 0.2."""
    upload_quantile: float = optional(number(0, 1), 0.2)
    """The upload is timed for the moment at which the agent is back with this probability. Default 0.2: an early upload
    costs only room, a late one is of no use."""
    upload_lead_s: float = optional(number(0, 60), 0.1)
    """The upload starts at least this long before that moment. Seconds, default 0.1 (paper: max(0.1 s, 1.25 T))."""
    job_mib: float = optional(number(0.001, 65_536), 64.0)
    """Copies are cut into jobs of this many MiB, so that urgent ones need not wait long. Default 64."""
    checksum_every: int = optional(count(1_000_000), 1_000)
    """One copied block in this many is compared with its source by checksum; where they differ, the Time Scheduler
    turns itself off. Default 1,000; 0: none."""
    debug_checksums: bool = optional(flag, False)
    """Checksum every block on its way out and in; a block that differs fails its copy. Slow. Default false."""
