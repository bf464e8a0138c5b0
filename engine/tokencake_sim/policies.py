"""Which schedulers can be compared? A policy says how the engine is built; everything else stays the same."""

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

    from tokencake_sim.clients.calls import Call
    from tokencake_sim.device.worker import Links, Worker


Settings: TypeAlias = Mapping[str, Mapping[str, bool | float | str]]
"""What the plug-in is set to, by section: `{"space": {...}, "time": {...}}`."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """How KV comes to the host and back."""

    connector: Callable[[int], ConnectorSpec]
    """The connector for so many blocks of host memory."""
    worker: Callable[[Links, int], Worker]
    """Models its worker side, with the bytes of a block."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to build the engine."""

    name: str
    summary: str
    settings: Settings | None = None
    """Of the TokenCake scheduler, which is off in the sections that are not there; None for vLLM's own scheduler."""
    host: HostMemory | None = None
    vllm_policy: Literal["fcfs", "priority"] = "fcfs"
    priority_of: Callable[[Call], int] | None = None
    kv_blocks: int | None = None
    """In place of the profile's."""
    is_recompute_free: bool = False

    def scheduler(self, is_async: bool) -> type[Scheduler]:
        """The class, for async scheduling or not; it brings its settings along."""
        return _stock(is_async) if self.settings is None else _tokencake(is_async, self.settings)

    def set_to(self, settings: Settings) -> Policy:
        """The same policy with `settings` over its own.

        Raises:
            SettingsError: this is vLLM's own scheduler, or a section of ours that the policy leaves off.
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
        """The modelled worker of the connector, or one that has nothing to do."""
        return NoWorker() if self.host is None else self.host.worker(links, block_bytes)


def _stock(is_async: bool) -> type[Scheduler]:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: PLC0415  heavy, and an optional dependency
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415  as above

    return AsyncScheduler if is_async else Scheduler


def _tokencake(is_async: bool, settings: Settings) -> type[Scheduler]:
    from tokencake_vllm.scheduler import TokenCakeAsyncScheduler, TokenCakeScheduler  # noqa: PLC0415  as above

    base: Any = TokenCakeAsyncScheduler if is_async else TokenCakeScheduler
    sections = {
        name: {"enabled": True, **settings[name]} if name in settings else {"enabled": False}
        for name in ("space", "time")
    }

    def configured(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["vllm_config"].additional_config = {"tokencake": sections}
        base.__init__(self, *args, **kwargs)

    return type(base.__name__, (base,), {"__init__": configured})


def _time_connector(host_blocks: int) -> ConnectorSpec:
    return ConnectorSpec("TokenCakeConnector", "tokencake_vllm.connector", (("host_blocks", host_blocks),))


def _time_worker(links: Links, block_bytes: int) -> Worker:
    from tokencake_sim.device.time_worker import TimeWorker  # noqa: PLC0415  imports vLLM

    return TimeWorker(links, block_bytes)


def _host_tier(host_blocks: int) -> ConnectorSpec:
    return ConnectorSpec("HostTier", "tokencake_sim.baseline.lru_connector", (("host_blocks", host_blocks),))


def _host_tier_worker(links: Links, block_bytes: int) -> Worker:
    from tokencake_sim.baseline.lru_worker import HostTierWorker  # noqa: PLC0415  imports vLLM

    return HostTierWorker(links, block_bytes)


def _oldest_application_first(call: Call) -> int:
    """Lowest first, as vLLM takes them: the older application, in it the call with most left to do."""
    return int(call.app.arrival_s * 1_000) * 100_000 - call.place.remaining_tokens


OUR_TIER: Final = HostMemory(_time_connector, _time_worker)
LRU_TIER: Final = HostMemory(_host_tier, _host_tier_worker)
UNLIMITED_BLOCKS: Final = 60_000

POLICIES: Final = {
    policy.name: policy
    for policy in (
        Policy("stock", "vLLM as it is: FCFS, prefix caching, chunked prefill"),
        Policy(
            "stock+host",
            "stock with a host tier: stores every finished call, LRU, loads on a hit, coalesced",
            host=LRU_TIER,
        ),
        Policy(
            "priority",
            "vLLM's priority policy: older application first, most remaining work first inside it",
            vllm_policy="priority",
            priority_of=_oldest_application_first,
        ),
        Policy("plugin", "the TokenCake scheduler with both of its parts off: decides as stock", {}),
        Policy(
            "ours",
            "TokenCake: our Space and our Time Scheduler",
            {"space": {}, "time": {}},
            host=OUR_TIER,
        ),
        Policy("time", "ours in part: the Time Scheduler", {"time": {}}, OUR_TIER),
        Policy("space", "ours in part: the Space Scheduler, no host memory", {"space": {}}),
        Policy(
            "space+host",
            "ours in part: the Space Scheduler on the host tier of stock+host",
            {"space": {}},
            host=LRU_TIER,
        ),
        Policy(
            "paper",
            "the published schedulers: score, memory partition, gate, upload lead",
            {"space": {"policy": "paper"}, "time": {"policy": "paper"}},
            host=OUR_TIER,
        ),
        Policy(
            "paper-time",
            "paper in part: the gate, score and upload lead of the Time Scheduler",
            {"time": {"policy": "paper"}},
            host=OUR_TIER,
        ),
        Policy(
            "paper-space+host",
            "paper in part: the request score and memory partition on the host tier of stock+host",
            {"space": {"policy": "paper"}},
            host=LRU_TIER,
        ),
        Policy(
            "time-lru",
            "time with least-recently-used replacement",
            {"time": {"policy": "lru"}},
            host=OUR_TIER,
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


def policy_named(name: str) -> Policy:
    """The policy of this name.

    Raises:
        UnknownPolicyError: there is none; the message lists those that there are.
    """
    if name not in POLICIES:
        raise UnknownPolicyError(name, POLICIES)
    return POLICIES[name]
