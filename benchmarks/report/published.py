"""Published figures for the same workload: the TokenCake fork of vLLM, and the paper.

The fork: code-writer, 24 applications at equal distances, Qwen2.5-14B on one A800 with 3,050 KV blocks, 100 GiB of host
memory. Medians of three runs at 0.05 and 0.1 applications per second, single runs otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Figures:
    """One configuration at one rate; seconds."""

    makespan_s: float
    mean_s: float
    p95_s: float


QPS: Final = (0.05, 0.1, 0.2, 0.5, 1.0)

FORK: Final = {
    "base": dict(
        zip(
            QPS,
            (
                Figures(875.74, 326.4, 456.0),
                Figures(940.76, 559.0, 725.3),
                Figures(938.79, 661.9, 821.6),
                Figures(938.99, 776.3, 883.8),
                Figures(960.44, 864.1, 929.1),
            ),
            strict=True,
        )
    ),
    "agent": dict(
        zip(
            QPS,
            (
                Figures(806.39, 277.3, 363.3),
                Figures(825.72, 539.9, 607.8),
                Figures(815.69, 553.8, 693.5),
                Figures(830.47, 638.2, 786.2),
                Figures(837.78, 694.4, 810.3),
            ),
            strict=True,
        )
    ),
    "offload": dict(
        zip(
            QPS,
            (
                Figures(677.62, 196.0, 252.9),
                Figures(672.67, 369.3, 459.7),
                Figures(681.66, 467.9, 569.0),
                Figures(713.16, 589.5, 659.3),
                Figures(691.01, 630.0, 660.8),
            ),
            strict=True,
        )
    ),
    "combined": dict(
        zip(
            QPS,
            (
                Figures(676.86, 204.4, 252.1),
                Figures(671.28, 359.8, 449.2),
                Figures(640.45, 448.8, 520.6),
                Figures(648.05, 529.6, 598.3),
                Figures(631.77, 525.3, 604.5),
            ),
            strict=True,
        )
    ),
}
"""`base` is vLLM as it is; `combined` is all of TokenCake."""

FORK_AT_ONE: Final = {
    "prefill tokens": 3_282_597.0,
    "device hit tokens": 2_591_264.0,
    "preemptions": 41.0,
    "queue, mean s": 62.97,
    "call latency, mean s": 76.5,
    "decode, mean s": 11.45,
    "running calls, mean": 8.4,
    "KV occupancy": 0.845,
}
"""What `base` did at one application per second."""

PAPER_REDUCTION: Final = {"vLLM": 0.207, "vLLM with prefix caching": 0.121}
"""Paper, figure 9 (14B, Code-Writer, 20 applications, 1 QPS): reduction of the mean application latency."""
