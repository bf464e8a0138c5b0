"""One agent in a loop of thinking and tools, as coding agents work: most tools take seconds, a few take minutes.

Tool times are a mixture: quick commands (lognormal, median 1.8 s), builds and tests (median 90 s) and people (median
180 s). The estimate is the median of the tool's kind: what a user could know.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from tokencake_sim.workload.model import Node, Prefix, Tool

if TYPE_CHECKING:
    import random

SUMMARY: Final = "one agent, 5 to 40 turns, heavy-tailed tools: commands, minutes of build, waits for people"

SYSTEM: Final = Prefix("react/system", 1_800)
CONTEXT_LIMIT: Final = 24_000
"""An agent stops, as real ones do, before its context outgrows the model."""

_KINDS: Final = (("command", 0.86, 1.8, 1.0), ("build", 0.11, 90.0, 0.6), ("ask_human", 0.03, 180.0, 1.0))
"""Tool, share of the calls, median seconds, sigma of the lognormal."""


def _lognormal(draw: random.Random, median: float, sigma: float, low: float, high: float) -> float:
    return min(high, max(low, draw.lognormvariate(math.log(median), sigma)))


def draw_tool(draw: random.Random) -> Tool:
    """One tool call of the mixture."""
    kind, _, median_s, sigma = draw.choices(_KINDS, weights=[share for _, share, _, _ in _KINDS])[0]
    return Tool(
        name=kind,
        duration_s=round(_lognormal(draw, median_s, sigma, 0.05, 900.0), 3),
        result_tokens=int(_lognormal(draw, 260.0, 1.1, 10.0, 4_000.0)),
        estimate_s=median_s,
    )


def turns(draw: random.Random, name: str, agent: str, count: int, first: Node) -> list[Node]:
    """`first`, then up to `count - 1` turns that each follow a tool; the last one has no tool."""
    nodes = [first]
    context = first.new_tokens + (first.prefix.tokens if first.prefix else 0)
    for turn in range(2, count + 1):
        before = nodes[-1]
        context += before.output_tokens + (before.tool.result_tokens if before.tool else 0)
        if context > CONTEXT_LIMIT:
            break
        nodes.append(
            Node(
                id=f"{name}_{turn}",
                agent=agent,
                new_tokens=0,
                output_tokens=int(_lognormal(draw, 130.0, 0.8, 16.0, 1_200.0)),
                predecessors=(before.id,),
                tool=draw_tool(draw),
                parent=first.parent,
            )
        )
    last = nodes.pop()
    nodes.append(
        Node(
            id=last.id,
            agent=agent,
            new_tokens=last.new_tokens,
            output_tokens=last.output_tokens,
            predecessors=last.predecessors,
            prefix=last.prefix,
            parent=last.parent,
        )
    )
    return nodes


def build(draw: random.Random) -> tuple[Node, ...]:
    """One agent with its own task and its own number of turns."""
    first = Node(
        id="turn_1",
        agent="react",
        new_tokens=draw.randint(300, 2_500),
        output_tokens=int(_lognormal(draw, 130.0, 0.8, 16.0, 1_200.0)),
        prefix=SYSTEM,
        tool=draw_tool(draw),
    )
    return tuple(turns(draw, "turn", "react", draw.randint(5, 40), first))
