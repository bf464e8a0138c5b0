"""Arrival times of applications."""

from __future__ import annotations

import random
from typing import Final, Literal, get_args

Arrivals = Literal["equal", "poisson", "bursty"]
ARRIVALS: Final[tuple[Arrivals, ...]] = get_args(Arrivals)

MEAN_BURST: Final = 4
"""Applications that arrive together, on average, where arrivals are bursty."""


def arrival_times(kind: Arrivals, count: int, qps: float, seed: int) -> list[float]:
    """Arrival times of `count` applications at `qps` per second on average, the first at 0."""
    draw = random.Random(f"arrivals/{seed}")  # noqa: S311  a simulation wants repeatable draws, not secret ones
    times: list[float] = []
    now_s = 0.0
    for index in range(count):
        times.append(now_s)
        match kind:
            case "equal":
                now_s = (index + 1) / qps
            case "poisson":
                now_s += draw.expovariate(qps)
            case "bursty":
                # A burst ends after each application with this chance, so its mean length is MEAN_BURST.
                now_s += draw.expovariate(qps / MEAN_BURST) if draw.random() < 1 / MEAN_BURST else 0.0
    return times
