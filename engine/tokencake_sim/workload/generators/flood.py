"""Critical agents in a flood of long calls for which no user waits: batch jobs that read and write much.

All calls carry hints. What is asked: do the few stay fast, and does the flood pay for it with less throughput?
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tokencake_sim.workload.model import Node, Prefix, Tool

if TYPE_CHECKING:
    import random

SUMMARY: Final = "one critical agent of 6 turns for every 3 long background calls"

_TURNS: Final = 6


def build_critical(draw: random.Random) -> tuple[Node, ...]:
    """One agent with a person behind it."""
    return tuple(
        Node(
            id=f"turn_{turn}",
            agent="assistant",
            new_tokens=draw.randint(500, 2_000) if turn == 1 else 0,
            output_tokens=draw.randint(80, 240),
            predecessors=(f"turn_{turn - 1}",) if turn > 1 else (),
            prefix=Prefix("flood/assistant", 1_000) if turn == 1 else None,
            tool=Tool("lookup", round(draw.uniform(0.5, 4.0), 3), 200, 2.0) if turn < _TURNS else None,
            critical=True,
        )
        for turn in range(1, _TURNS + 1)
    )


def build_batch(draw: random.Random) -> tuple[Node, ...]:
    """One long call."""
    return (
        Node(
            id="batch",
            agent="batch",
            new_tokens=draw.randint(3_000, 8_000),
            output_tokens=draw.randint(800, 1_600),
            critical=False,
        ),
    )
