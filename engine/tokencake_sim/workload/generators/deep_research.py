"""The published research pipeline: a planner, three chains of search, analysis and summary, then one long tail.

Context sizes are not published for this one; the first prompt and the results are taken from the coding pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tokencake_sim.workload.generators.code_writer import FIRST_PROMPT_TOKENS, RESULT_TOKENS, ROLE_TOKENS
from tokencake_sim.workload.model import Node, Tool

if TYPE_CHECKING:
    import random

SUMMARY: Final = (
    "32-call research DAG: planner, 3 parallel chains of 3 rounds (search, analysis, summary), reflection, report"
)

_CHAINS: Final = 3
_ROUNDS: Final = 3


def _node(name: str, agent: str, output_tokens: int, *after: str, tool: tuple[str, float] | None = None) -> Node:
    return Node(
        id=name,
        agent=agent,
        new_tokens=ROLE_TOKENS if after else FIRST_PROMPT_TOKENS,
        output_tokens=output_tokens,
        predecessors=after,
        tool=None if tool is None else Tool(tool[0], tool[1], RESULT_TOKENS, estimate_s=tool[1]),
        join="reflection" if agent in {"search", "analysis", "summary"} else None,
    )


def build(draw: random.Random) -> tuple[Node, ...]:
    """One application; all are alike but for their text."""
    del draw
    nodes = [_node("planner", "planner", 512, tool=("plan", 3.0))]
    for chain in range(1, _CHAINS + 1):
        before = "planner"
        for turn in range(1, _ROUNDS + 1):
            search, analysis, summary = (f"{part}_{chain}_{turn}" for part in ("search", "analysis", "summary"))
            nodes += [
                _node(search, "search", 256, before, tool=("search", 4.0)),
                _node(analysis, "analysis", 256, search, tool=("analysis", 2.0)),
                _node(summary, "summary", 256, analysis),
            ]
            before = summary
    nodes += [
        _node("reflection", "reflection", 256, *(f"summary_{c}_{_ROUNDS}" for c in (1, 2, 3)), tool=("reflect", 5.0)),
        _node("judge", "judge", 256, "reflection", tool=("conditional", 0.4)),
        _node("text_generator", "text_generator", 256, "judge", tool=("file_write", 1.7)),
        _node("image_generator", "image_generator", 256, "text_generator", tool=("image", 18.0)),
        Node("answerer", "answerer", new_tokens=0, output_tokens=0, predecessors=("image_generator",)),
    ]
    return tuple(nodes)
