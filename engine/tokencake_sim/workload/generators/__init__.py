"""Generators of the workloads that come with the simulator.

A generator builds one application from its id and a seeded source of randomness; arrival times are laid over them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tokencake_sim.workload.arrivals import Arrivals, arrival_times
from tokencake_sim.workload.generators import chat, code_writer, deep_research, flood, react, supervisor
from tokencake_sim.workload.load import check_nodes
from tokencake_sim.workload.model import App, Node, Workload

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GENERATORS", "generate"]

Build = Callable[[random.Random], tuple[Node, ...]]

CHATS_PER_PAIR: Final = 3
"""`mixed`: ordinary chats for each pair of a code-writer and a deep-research application."""

_KINDS: Final[Mapping[str, Build]] = {
    "code-writer": code_writer.build,
    "deep-research": deep_research.build,
    "react": react.build,
    "supervisor": supervisor.build,
    "chat": chat.build,
    "critical": flood.build_critical,
    "batch": flood.build_batch,
}
_PATTERNS: Final[Mapping[str, tuple[str, ...]]] = {
    "code-writer": ("code-writer",),
    "deep-research": ("deep-research",),
    "react": ("react",),
    "supervisor": ("supervisor",),
    "flood": ("batch", "critical", "batch", "batch"),
    "mixed": ("code-writer", "chat", "deep-research", "chat", "chat"),
}
GENERATORS: Final[Mapping[str, str]] = {
    "code-writer": code_writer.SUMMARY,
    "deep-research": deep_research.SUMMARY,
    "react": react.SUMMARY,
    "supervisor": supervisor.SUMMARY,
    "flood": flood.SUMMARY,
    "mixed": f"code-writer and deep-research in turn, {CHATS_PER_PAIR} chats without hints for each pair of them",
}
"""Name and one line about each workload."""


def generate(name: str, *, count: int, qps: float, seed: int, arrivals: Arrivals = "equal") -> Workload:
    """`count` applications of the workload `name`; `mixed` counts its chats as applications."""
    pattern = _PATTERNS[name]
    apps: list[App] = []
    for index, arrival_s in enumerate(arrival_times(arrivals, count, qps, seed)):
        kind = pattern[index % len(pattern)]
        app_id = f"{kind}-{index}"
        nodes = _KINDS[kind](random.Random(f"{seed}/{app_id}"))  # noqa: S311  repeatable, not secret
        check_nodes(f"generator {name}", app_id, list(nodes))
        apps.append(App(app_id, kind, arrival_s, nodes, is_agentic=kind != "chat"))
    # The seed is part of every text, or two seeds would share their prompts.
    apps = [replace(app, id=f"s{seed}-{app.id}") for app in apps]
    return Workload(name, tuple(apps), f"generator {name}")
