"""Cost model of one engine: seconds of copies, prefill and admission, measured; guessed until the first measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, inf
from typing import Final

ALPHA: Final = 0.5
"""Weight of the newest measurement (that of the authors' implementation)."""
FIRST_GUESS_BYTES_PER_S: Final = 12e9
"""Of either direction (the paper's code)."""
FIRST_GUESS_PREFILL_TOKENS_PER_S: Final = 5_000.0

WINDOW_S: Final = 10.0
QUIET_SHARE: Final = 0.5
"""Calls may arrive faster than they lately did: only half of the free blocks are counted on."""


@dataclass(slots=True)
class Rate:
    """Seconds per unit, as a fading mean."""

    seconds: float

    def learn(self, units: float, seconds: float) -> None:
        """`units` took `seconds`."""
        if units > 0 and seconds > 0:
            self.seconds += ALPHA * (seconds / units - self.seconds)


@dataclass(slots=True)
class CacheResidency:
    """How long unreferenced blocks stay in the device's prefix cache."""

    seconds: float = inf
    """Learned from blocks that were looked up."""
    taken: float = 0.0
    """Blocks that calls allocated within about the last `WINDOW_S`."""
    since_s: float = 0.0

    def take(self, blocks: float, now_s: float) -> None:
        """A call allocated `blocks`."""
        self.taken = self._lately(now_s) + blocks
        self.since_s = now_s

    def from_now_s(self, free_blocks: int, now_s: float) -> float:
        """Seconds that a block freed now will stay: as in the past, or longer while calls allocate few."""
        lately = self._lately(now_s)
        return max(self.seconds, QUIET_SHARE * free_blocks * WINDOW_S / lately) if lately > 0 else inf

    def _lately(self, now_s: float) -> float:
        return self.taken * exp(min(0.0, self.since_s - now_s) / WINDOW_S)

    def learn(self, age_s: float, *, was_there: bool) -> None:
        """Blocks freed `age_s` ago were still there, or were not."""
        if was_there != (age_s <= self.seconds):
            self.seconds = age_s if self.seconds == inf else self.seconds + ALPHA * (age_s - self.seconds)


@dataclass(slots=True)
class CostModel:
    """Costs on this engine, in seconds."""

    block_bytes: int
    block_tokens: int
    to_host: Rate = field(init=False)
    """Per block."""
    to_device: Rate = field(init=False)
    """Per block."""
    prefill: Rate = field(init=False)
    """Per token."""
    admission: Rate = field(default_factory=lambda: Rate(0.0))
    """Per call that gets its first slot while others wait."""

    residency: CacheResidency = field(default_factory=CacheResidency)

    def __post_init__(self) -> None:
        self.to_host = Rate(self.block_bytes / FIRST_GUESS_BYTES_PER_S)
        self.to_device = Rate(self.block_bytes / FIRST_GUESS_BYTES_PER_S)
        self.prefill = Rate(1.0 / FIRST_GUESS_PREFILL_TOKENS_PER_S)

    def store_s(self, blocks: int) -> float:
        """Copying `blocks` to the host."""
        return blocks * self.to_host.seconds

    def load_s(self, blocks: int) -> float:
        """Copying `blocks` to the device."""
        return blocks * self.to_device.seconds

    def recompute_s(self, blocks: int) -> float:
        """Computing `blocks` again."""
        return blocks * self.block_tokens * self.prefill.seconds
