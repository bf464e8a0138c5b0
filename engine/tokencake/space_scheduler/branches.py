"""Live branches of an application, and the slack of each: the seconds it can slip without delaying its join.

A branch is a waiting or running call, or a stalled agent whose next call is still to come. Two branches feed one join
if their hints say so, or if the graph leads from both of them to one node. The branch with the longest remaining path
is critical: its slack is 0, and that of the others is the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from tokencake.bounded import BoundedDict

if TYPE_CHECKING:
    from tokencake.forecast.graph_stats import PathCosts
    from tokencake.forecast.roles import NodeKey

MAX_STALLED: Final = 64
"""Stalled branches remembered of one application."""

MAX_NODES: Final = 64
"""The slack of an application with branches at more nodes is not measured: comparing them takes too long."""

_Key: TypeAlias = "tuple[str | None, str | None, NodeKey]"


@dataclass(frozen=True, slots=True)
class Branch:
    """Position of one branch in its graph, and its remaining path."""

    call: str
    session: str
    node_key: NodeKey
    join: str | None
    parent: str | None
    """The call inside whose tool call this branch works."""
    at_s: float
    """When its call arrived, or ended where it is stalled."""
    remaining_s: float
    """From then on, along the longest path."""
    until_s: float = float("inf")
    """Deadline after which a stalled branch no longer holds up its join."""

    def left_s(self, now: float) -> float:
        """What is left of its remaining path."""
        return max(0.0, self.remaining_s - (now - self.at_s))


class StalledBranches:
    """The branches of one application between two calls."""

    def __init__(self) -> None:
        self._branches: BoundedDict[str, Branch] = BoundedDict(MAX_STALLED)
        self._last: Branch | None = None

    def leave(self, branch: Branch) -> None:
        """A call ended, and its branch is stalled."""
        self._last = self._branches[branch.call] = branch

    def of_call(self, call: str | None) -> Branch | None:
        """The branch whose last call this was."""
        return None if call is None else self._branches.get(call)

    def living(self, now: float) -> list[Branch]:
        """Those before their deadline."""
        return [branch for branch in self._branches.values() if now < branch.until_s]

    def arrive(
        self, session: str, node_key: NodeKey, join: str | None, parent: str | None, path_costs: PathCosts | None
    ) -> tuple[Branch | None, bool]:
        """A call arrived: the branches that it continues or joins are over.

        Returns:
            The branch that ended last of those it waited for, and whether that is sure or a guess.
        """
        is_known = any(branch.session == session for branch in self._branches.values())
        over: dict[str, Branch] = {}
        for branch in self._branches.values():  # a caller comes before its sub-agents
            is_own = branch.session == session or branch.parent in over
            is_beside = branch.parent == parent and branch.call != parent
            if is_own or (is_beside and _joins(branch, node_key, join, path_costs, is_known)):
                over[branch.call] = branch
        for name in over:
            del self._branches[name]
        if over:
            return max(over.values(), key=lambda branch: branch.at_s), True
        return self.of_call(parent) or self._last, False


def _joins(branch: Branch, node_key: NodeKey, join: str | None, path_costs: PathCosts | None, is_known: bool) -> bool:
    """Whether a call of `node_key` follows the join that `branch` feeds."""
    if (
        path_costs is None
        or branch.node_key[0] != node_key[0]
        or node_key[1] not in path_costs.topology.descendants.get(branch.node_key[1], ())
    ):
        return False
    return branch.join != join if branch.join is not None else not is_known


def slacks_s(
    branches: Sequence[Branch], path_costs_of: Callable[[str], PathCosts | None], now: float
) -> list[float | None]:
    """Slack of each branch: the seconds it can slip without delaying its join; None for one without siblings.

    Args:
        branches: all live ones of one application.
        path_costs_of: the path costs of a graph by its name.
        now: on the engine's clock.
    """
    farthest: dict[_Key, float] = {}
    counts: dict[_Key, int] = {}
    for branch in branches:
        key = branch.parent, branch.join, branch.node_key
        farthest[key] = max(farthest.get(key, 0.0), branch.left_s(now))
        counts[key] = counts.get(key, 0) + 1
    latest: dict[_Key, float | None] = dict.fromkeys(counts)
    for key, count in counts.items() if len(counts) <= MAX_NODES else ():
        others = [
            left_s for other, left_s in farthest.items() if other != key and _is_together(key, other, path_costs_of)
        ]
        latest[key] = max([*others, farthest[key]]) if others or count > 1 else None
    found: list[float | None] = []
    for branch in branches:
        until_s = latest[branch.parent, branch.join, branch.node_key]
        found.append(None if until_s is None else max(0.0, until_s - branch.left_s(now)))
    return found


def _is_together(one: _Key, other: _Key, path_costs_of: Callable[[str], PathCosts | None]) -> bool:
    (parent, join, (graph, node)), (other_parent, other_join, (other_graph, other_node)) = one, other
    if parent != other_parent:
        return False
    if join is not None and other_join is not None:
        return join == other_join
    path_costs = path_costs_of(graph) if graph == other_graph else None
    if (
        path_costs is None
        or node not in path_costs.topology.descendants
        or other_node not in path_costs.topology.descendants
    ):
        return False
    descendants, other_descendants = path_costs.topology.descendants[node], path_costs.topology.descendants[other_node]
    return (
        node not in other_descendants
        and other_node not in descendants
        and not descendants.isdisjoint(other_descendants)
    )
