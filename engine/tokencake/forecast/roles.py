"""Role of a call: the one key under which everything about calls is learned.

The prebuilt agents of LangChain give their nodes the same names, so a node says nothing without its agent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from tokencake.protocol import Hint


NodeKey: TypeAlias = tuple[str, str]
"""Graph and node: where graph statistics are kept."""


class Role(NamedTuple):
    """Agent, graph and node; "" for what the hint does not say.

    The tenant's prefix is a part of it: statistics are never shared between tenants.
    """

    agent: str = ""
    graph: str = ""
    node: str = ""
    tenant: str = ""

    @property
    def of_agent(self) -> Role:
        """The agent without graph and node: for what does not depend on the node, for example a tool's duration."""
        return self._replace(graph="", node="")

    @property
    def label(self) -> str:
        """The node within one graph, told apart from nodes of the same name that belong to other agents."""
        return f"{self.agent}/{self.node}" if self.node and self.node != self.agent else self.agent

    def node_key(self, tenant: str, root: str | None = None) -> NodeKey:
        """The node in its graph; where the hint names no graph, in that of the applications that begin with `root`.

        A made-up graph is told apart from every named one by its first character: a client's cannot be empty.

        Args:
            tenant: of the application.
            root: the agent of the application's first call; None for a call without a hint.
        """
        if self.graph:  # its description names the nodes
            return self.graph, self.node or self.agent
        return (f"\0{tenant}", "") if root is None else (f"\0{tenant}\0{root}", self.label)


def role_of(hint: Hint | None, tenant: str = "") -> Role:
    """The role of the call with this hint; of one without a hint, the empty role of its `tenant`."""
    if hint is None:
        return Role(tenant=tenant)
    return Role(hint.agent or "", hint.graph or "", hint.node or "", hint.tenant)
