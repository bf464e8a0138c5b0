"""How fast are the copies, the prefill and the queue here? Measured, and guessed only until the first measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

ALPHA: Final = 0.5
"""Weight of the newest measurement (the fork's)."""
FIRST_GUESS_BYTES_PER_S: Final = 12e9
"""Of either direction (the paper's code)."""
FIRST_GUESS_PREFILL_TOKENS_PER_S: Final = 5_000.0


@dataclass(slots=True)
class Rate:
    """Seconds per unit of something, averaged with fading weights."""

    seconds: float

    def learn(self, units: float, seconds: float) -> None:
        """`units` took `seconds`."""
        if units > 0 and seconds > 0:
            self.seconds += ALPHA * (seconds / units - self.seconds)


@dataclass(slots=True)
class Rates:
    """What things cost on this engine, in seconds."""

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

    def __post_init__(self) -> None:
        self.to_host = Rate(self.block_bytes / FIRST_GUESS_BYTES_PER_S)
        self.to_device = Rate(self.block_bytes / FIRST_GUESS_BYTES_PER_S)
        self.prefill = Rate(1.0 / FIRST_GUESS_PREFILL_TOKENS_PER_S)

    def store_s(self, blocks: int) -> float:
        """Copying so many blocks to the host."""
        return blocks * self.to_host.seconds

    def load_s(self, blocks: int) -> float:
        """Copying so many blocks to the device."""
        return blocks * self.to_device.seconds

    def recompute_s(self, blocks: int) -> float:
        """Computing so many blocks again."""
        return blocks * self.block_tokens * self.prefill.seconds
