"""A supervisor that calls other agents as tools: it is stalled until all of them have answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tokencake_sim.workload.generators.react import turns
from tokencake_sim.workload.model import Node, Prefix, Tool

if TYPE_CHECKING:
    import random

SUMMARY: Final = "a supervisor with 2 to 4 rounds of 1 to 3 sub-agents as tools, each a short loop of its own"

_SYSTEM: Final = Prefix("supervisor/system", 1_200)
_WORKERS: Final = ("researcher", "coder", "critic")
_REPORT_TOKENS: Final = 350


def build(draw: random.Random) -> tuple[Node, ...]:
    """One supervisor with the rounds that its task takes."""
    nodes: list[Node] = []
    rounds = draw.randint(2, 4)
    for turn in range(1, rounds + 1):
        hired = draw.sample(_WORKERS, draw.randint(1, 3))
        supervisor = Node(
            id=f"supervisor_{turn}",
            agent="supervisor",
            new_tokens=draw.randint(400, 1_500) if turn == 1 else 0,
            output_tokens=draw.randint(60, 300),
            predecessors=(f"supervisor_{turn - 1}",) if turn > 1 else (),
            prefix=_SYSTEM if turn == 1 else None,
            # The sub-agents fill the time: the tool itself only packs their reports.
            tool=Tool("delegate", 0.05, _REPORT_TOKENS * len(hired)),
        )
        nodes.append(supervisor)
        for worker in hired:
            name = f"{worker}_{turn}"
            first = Node(
                id=f"{name}_1",
                agent=worker,
                new_tokens=draw.randint(200, 900),
                output_tokens=draw.randint(40, 250),
                prefix=Prefix(f"supervisor/{worker}", 900),
                tool=Tool("command", round(draw.uniform(0.3, 6.0), 3), draw.randint(60, 900), 2.0),
                parent=supervisor.id,
            )
            nodes += turns(draw, name, worker, draw.randint(2, 5), first)
    nodes.append(Node("answer", "supervisor", new_tokens=0, output_tokens=400, predecessors=(f"supervisor_{rounds}",)))
    return tuple(nodes)
