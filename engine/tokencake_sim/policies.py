"""Policies that can be compared: each says how the engine is built; everything else stays the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from tokencake.settings import SettingsError
from tokencake_sim.device.worker import NoWorker
from tokencake_sim.engine.build import ConnectorSpec
from tokencake_sim.errors import UnknownPolicyError

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake_sim.clients.calls import SimCall
    from tokencake_sim.device.worker import Links, Worker


Settings: TypeAlias = Mapping[str, Mapping[str, bool | float | str]]
"""Settings of the plug-in by section: `{"space": {...}, "time": {...}}`."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The connector that copies KV to the host and back, and the model of its worker."""

    connector: Callable[[int], ConnectorSpec]
    """The connector for a number of host blocks."""
    worker: Callable[[Links, int], Worker]
    """Models its worker side, for a link and the bytes of a block."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to build the engine."""

    name: str
    summary: str
    settings: Settings | None = None
    """Settings of TokenCake's scheduler by section, a missing section being off; None for vLLM's own scheduler."""
    host: HostMemory | None = None
    vllm_policy: Literal["fcfs", "priority"] = "fcfs"
    priority_of: Callable[[SimCall], int] | None = None
    kv_blocks: int | None = None
    """In place of the profile's."""
    is_recompute_free: bool = False

    def scheduler(self, is_async: bool) -> type[Scheduler]:
        """The scheduler class, with async scheduling or without."""
        return _stock(is_async) if self.settings is None else _tokencake(is_async)

    def additional_config(self) -> dict[str, Any]:
        """What `--additional-config` of a real engine would be: a section that is not there is off."""
        if self.settings is None:
            return {}
        sections = {
            name: {"enabled": True, **self.settings[name]} if name in self.settings else {"enabled": False}
            for name in ("space", "time")
        }
        return {"tokencake": sections}

    def set_to(self, settings: Settings) -> Policy:
        """The same policy with `settings` over its own.

        Raises:
            SettingsError: the policy has no such section: it is vLLM's own scheduler, or leaves the section off.
        """
        for section in settings:
            if self.settings is None or section not in self.settings:
                raise SettingsError(
                    f"policy {self.name} has no section {section} to set; "
                    f"its sections are {', '.join(self.settings or ()) or 'none'}"
                )
        own = self.settings or {}
        return replace(self, settings={name: {**own[name], **settings.get(name, {})} for name in own})

    def make_worker(self, links: Links, block_bytes: int) -> Worker:
        """The modelled worker of the connector; one that does nothing where there is no connector."""
        return NoWorker() if self.host is None else self.host.worker(links, block_bytes)


def _stock(is_async: bool) -> type[Scheduler]:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: PLC0415  heavy, and an optional dependency
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415  as above

    return AsyncScheduler if is_async else Scheduler


def _tokencake(is_async: bool) -> type[Scheduler]:
    from tokencake_vllm.scheduler import TokenCakeAsyncScheduler, TokenCakeScheduler  # noqa: PLC0415  as above

    return TokenCakeAsyncScheduler if is_async else TokenCakeScheduler


def _tokencake_connector(host_blocks: int) -> ConnectorSpec:
    return ConnectorSpec("TokenCakeConnector", "tokencake_vllm.connector", (("host_blocks", host_blocks),))


def _transfer_model(links: Links, block_bytes: int) -> Worker:
    from tokencake_sim.device.time_worker import TransferModel  # noqa: PLC0415  imports vLLM

    return TransferModel(links, block_bytes)


def _lru_connector(host_blocks: int) -> ConnectorSpec:
    return ConnectorSpec("LruOffloadConnector", "tokencake_sim.baseline.lru_connector", (("host_blocks", host_blocks),))


def _lru_transfer_model(links: Links, block_bytes: int) -> Worker:
    from tokencake_sim.baseline.lru_worker import LruTransferModel  # noqa: PLC0415  imports vLLM

    return LruTransferModel(links, block_bytes)


def _oldest_application_first(call: SimCall) -> int:
    """Priority for vLLM, lowest first: older applications first, in each the call with most work left."""
    return int(call.app.arrival_s * 1_000) * 100_000 - call.place.remaining_tokens


TOKENCAKE_HOST: Final = HostMemory(_tokencake_connector, _transfer_model)
LRU_HOST: Final = HostMemory(_lru_connector, _lru_transfer_model)
UNLIMITED_BLOCKS: Final = 60_000

POLICIES: Final = {
    policy.name: policy
    for policy in (
        Policy("stock", "vLLM as it is: FCFS, prefix caching, chunked prefill"),
        Policy(
            "stock+host",
            "stock with host memory: stores every finished call, LRU, loads on a hit, coalesced",
            host=LRU_HOST,
        ),
        Policy(
            "priority",
            "vLLM's priority policy: older application first, in it the call with most work left",
            vllm_policy="priority",
            priority_of=_oldest_application_first,
        ),
        Policy("plugin", "the TokenCake scheduler with both of its parts off: decides as stock", {}),
        Policy(
            "default",
            "TokenCake with its defaults: Space and Time Scheduler",
            {"space": {}, "time": {}},
            host=TOKENCAKE_HOST,
        ),
        Policy("time", "default in part: the Time Scheduler", {"time": {}}, TOKENCAKE_HOST),
        Policy("space", "default in part: the Space Scheduler, no host memory", {"space": {}}),
        Policy(
            "space+host",
            "default in part: the Space Scheduler on the host memory of stock+host",
            {"space": {}},
            host=LRU_HOST,
        ),
        Policy(
            "paper",
            "the published schedulers: score, memory partition, gate, upload lead",
            {"space": {"policy": "paper"}, "time": {"policy": "paper"}},
            host=TOKENCAKE_HOST,
        ),
        Policy(
            "paper-time",
            "paper in part: the gate, score and upload lead of the Time Scheduler",
            {"time": {"policy": "paper"}},
            host=TOKENCAKE_HOST,
        ),
        Policy(
            "paper-space+host",
            "paper in part: the request score and memory partition on the host tier of stock+host",
            {"space": {"policy": "paper"}},
            host=LRU_HOST,
        ),
        Policy(
            "time-lru",
            "time with least-recently-used replacement",
            {"time": {"policy": "lru"}},
            host=TOKENCAKE_HOST,
        ),
        Policy(
            "unlimited",
            f"bound: stock with {UNLIMITED_BLOCKS} KV blocks on the device",
            kv_blocks=UNLIMITED_BLOCKS,
        ),
        Policy(
            "no-recompute",
            "bound: stock, computing a prefix again takes no time",
            is_recompute_free=True,
        ),
    )
}


FORMER_NAMES: Final = {"ours": "default"}
"""Names that policies had, and that are still understood."""


def policy_named(name: str) -> Policy:
    """The policy of this name.

    Raises:
        UnknownPolicyError: there is none; the message lists those that there are.
    """
    name = FORMER_NAMES.get(name, name)
    if name not in POLICIES:
        raise UnknownPolicyError(name, POLICIES)
    return POLICIES[name]
