"""Registries of the policies that settings choose by name, one for each decision: admission, offload, eviction.

A new policy is a class that follows its contract (`space_scheduler.policy`, `time_scheduler.policy`) and a line here;
`tests/unit/core/policies/test_registry.py` holds every entry to its contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tokencake.policies.default_space import DefaultSpacePolicy
from tokencake.policies.default_time import DefaultTimePolicy
from tokencake.policies.eviction import LeastRecentlyUsed, NextUse
from tokencake.policies.paper_space import PaperSpacePolicy
from tokencake.policies.paper_time import PaperTimePolicy
from tokencake.space_scheduler.policy import SpacePolicy
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake.time_scheduler.policy import EvictionPolicy, TimePolicy

ADMISSION: Final[dict[str, Callable[[SpaceSettings], SpacePolicy]]] = {
    "default": DefaultSpacePolicy,
    "paper": PaperSpacePolicy,
}
"""Order, admission and preemption: `space.policy`."""
OFFLOAD: Final[dict[str, Callable[[], TimePolicy]]] = {
    "default": DefaultTimePolicy,
    "paper": PaperTimePolicy,
}
"""What becomes of the KV of a finished request: `time.policy`."""
EVICTION: Final[dict[str, Callable[[], EvictionPolicy]]] = {
    "next_use": NextUse,
    "lru": LeastRecentlyUsed,
}
"""What leaves a full host: `time.advanced.eviction`."""

BY_SETTING: Final[Mapping[str, Mapping[str, object]]] = {
    "space.policy": ADMISSION,
    "time.policy": OFFLOAD,
    "time.eviction": EVICTION,
}
"""The registry from which each setting takes its value."""
