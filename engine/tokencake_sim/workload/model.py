"""Workloads: applications with their calls, tools and arrival times, all known beforehand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tool:
    """The external call that follows an LLM call and stalls its agent."""

    name: str
    duration_s: float
    result_tokens: int
    estimate_s: float | None = None
    """The user's estimate; None where there is none."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Text that every node naming the same `key` begins with, in all applications."""

    key: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Node:
    """One LLM call, or plain code where `output_tokens` is 0.

    Its prompt is `prefix`, then the contexts of its predecessors (what they share once, then each branch's own part in
    their order), then `new_tokens` of its own. A context is a prompt, the answer to it and the tool's result.
    """

    id: str
    agent: str
    new_tokens: int
    output_tokens: int
    predecessors: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    """Nodes that must be over before this one begins, and of whose text it takes nothing."""
    prefix: Prefix | None = None
    tool: Tool | None = None
    parent: str | None = None
    """This node works inside the tool call of `parent`: it starts with that call and holds up its end."""
    join: str | None = None
    """The join that this branch feeds."""
    critical: bool | None = None
    importance: float | None = None
    keeps_answer: bool = True
    """False: its context lacks its answer, as where a model's reasoning is not sent back."""

    @property
    def is_local(self) -> bool:
        """Whether the node makes no LLM call."""
        return self.output_tokens == 0


@dataclass(frozen=True, slots=True)
class App:
    """One application instance. `nodes` are in an order in which they could run."""

    id: str
    kind: str
    arrival_s: float
    nodes: tuple[Node, ...]
    is_agentic: bool = True
    """False for ordinary traffic: its calls carry no hint and send no events."""


@dataclass(frozen=True, slots=True)
class Workload:
    """All applications of a run, earliest first."""

    name: str
    apps: tuple[App, ...]
    source: str
    """The file or generator, for messages."""
