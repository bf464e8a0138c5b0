"""Ordinary traffic between the agents: one question, one answer, no hint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokencake_sim.workload.model import Node, Prefix

if TYPE_CHECKING:
    import random


def build(draw: random.Random) -> tuple[Node, ...]:
    """One chat call."""
    return (
        Node(
            id="chat",
            agent="chat",
            new_tokens=draw.randint(100, 2_000),
            output_tokens=draw.randint(50, 500),
            prefix=Prefix("chat/system", 300),
        ),
    )
