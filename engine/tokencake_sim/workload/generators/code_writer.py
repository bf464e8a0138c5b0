"""The published coding pipeline: 29 nodes, 27 calls, 6,464 output tokens, contexts that only grow.

Structure, output lengths and tool times are those of the published workload. Its mean prompt of 9,060 tokens fixes what
is not published, the length of a tool's result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tokencake_sim.workload.model import Node, Tool

if TYPE_CHECKING:
    import random

SUMMARY: Final = "29-node coding DAG (27 calls, 18 tools): plan, three programmers, two reviewers, two revisers, tests"

FIRST_PROMPT_TOKENS: Final = 4_608
ROLE_TOKENS: Final = 30
RESULT_TOKENS: Final = 247
"""With the two above, the mean prompt is the published one."""

_PROGRAMMERS: Final = ("1", "2", "3")
_REVISERS: Final = ("1", "2")


def _node(
    name: str,
    output_tokens: int,
    *after: str,
    tool: tuple[str, float] | None = None,
    join: str | None = None,
    critical: bool = True,
) -> Node:
    return Node(
        id=name,
        agent=name.rstrip("123").rstrip("_") if name[-1].isdigit() else name,
        new_tokens=ROLE_TOKENS if after != ("start",) else FIRST_PROMPT_TOKENS,
        output_tokens=output_tokens,
        predecessors=after,
        tool=None if tool is None else Tool(tool[0], tool[1], RESULT_TOKENS, estimate_s=tool[1]),
        join=join,
        critical=critical,
    )


def build(draw: random.Random) -> tuple[Node, ...]:
    """One application. All are alike: the published inputs differ in their text only."""
    del draw
    nodes = [
        Node("start", "start", new_tokens=0, output_tokens=0),
        _node("architect_1", 200, "start"),
        _node("search_1", 128, "architect_1", tool=("search", 4.0)),
        _node("judger_1", 128, "search_1", tool=("conditional", 0.4)),
        _node("architect_2", 200, "judger_1"),
        _node("search_2", 128, "architect_2", tool=("search", 4.0)),
        _node("judger_2", 128, "search_2", tool=("conditional", 0.4)),
        _node("file_write_plan", 128, "judger_2", tool=("file_write", 0.1)),
    ]
    for n in _PROGRAMMERS:
        nodes += [
            _node(
                f"programmer_{n}_validate",
                400,
                "file_write_plan",
                tool=("tool_call", 8.0),
                join="implementation_review",
                critical=n == "1",
            ),
            _node(
                f"programmer_{n}_repair",
                400,
                f"programmer_{n}_validate",
                join="implementation_review",
                critical=n == "1",
            ),
            _node(
                f"code_write_{n}",
                128,
                f"programmer_{n}_repair",
                tool=("file_write", 0.1),
                join="implementation_review",
                critical=n == "1",
            ),
        ]
    written = tuple(f"code_write_{n}" for n in _PROGRAMMERS)
    nodes += [_node(f"reviewer_{n}", 200, *written, join="revision", critical=n == "1") for n in _REVISERS]
    for n in _REVISERS:
        nodes += [
            _node(
                f"reviser_{n}_validate",
                400,
                "reviewer_1",
                "reviewer_2",
                tool=("tool_call", 10.0),
                join="final_merge",
                critical=n == "1",
            ),
            _node(f"reviser_{n}_repair", 400, f"reviser_{n}_validate", join="final_merge", critical=n == "1"),
            _node(
                f"revised_code_write_{n}",
                128,
                f"reviser_{n}_repair",
                tool=("file_write", 0.1),
                join="final_merge",
                critical=n == "1",
            ),
        ]
    nodes += [
        _node("external_eval", 128, "reviewer_2", tool=("eval", 4.5), join="final_merge"),
        _node("user_confirm", 128, "external_eval", tool=("confirm", 3.5), join="final_merge"),
        _node("test_node", 128, "user_confirm", tool=("test", 5.5), join="final_merge"),
        Node(
            "end",
            "end",
            new_tokens=0,
            output_tokens=0,
            predecessors=("test_node", "revised_code_write_1", "revised_code_write_2"),
        ),
    ]
    return tuple(nodes)
