"""`tokencake sim record`: a workload from a real run.

What a prompt has more than the context before it, results of tools included, counts as new text. Time that passed with
neither call nor tool, a human or plain code, is a local node.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from tokencake_sim.capture.lineage import CallDependency, applications, dependencies_of, shared_prefixes
from tokencake_sim.capture.past_calls import PastCall, PastRun, read_past
from tokencake_sim.errors import WorkloadError
from tokencake_sim.workload.fields import MAX_TEXT
from tokencake_sim.workload.load import parse_workload, to_json
from tokencake_sim.workload.model import App, Node, Prefix, Tool, Workload

SHORTEST_PAUSE_S: Final = 0.1
"""Shorter times between calls are the client's own steps and are left out."""

_PAUSE: Final = "~pause"


def workload_of(run: PastRun) -> Workload:
    """The workload that `run` was.

    Raises:
        WorkloadError: no call is left, or the calls cannot have been made as the state says.
    """
    if not run.calls:
        raise WorkloadError(run.source, "the state", "has no finished call with a hint; run an application first")
    groups = applications(run.calls)
    dependencies = {name: dependency for group in groups for name, dependency in dependencies_of(group).items()}
    prefixes = shared_prefixes(run.calls, dependencies)
    block_tokens = math.gcd(*(call.cached_tokens for call in run.calls))  # or a multiple: whole blocks are cached
    apps = tuple(
        App(
            id=group[0].app[:MAX_TEXT],
            kind="recorded",
            arrival_s=group[0].arrived_s - run.calls[0].arrived_s,
            nodes=_Nodes(group, dependencies, prefixes, block_tokens).all(),
        )
        for group in groups
    )
    return parse_workload(to_json(Workload("recorded", apps, run.source)), run.source)


class _Nodes:
    """The nodes of one application."""

    def __init__(
        self,
        group: Sequence[PastCall],
        dependencies: Mapping[str, CallDependency],
        prefixes: Mapping[str, int],
        block_tokens: int,
    ) -> None:
        self._group = group
        self._block_tokens = block_tokens
        self._dependencies = dependencies
        self._prefixes = prefixes
        self._names = {
            call.id: f"{place}-{call.agent}"[: MAX_TEXT - len(_PAUSE)] for place, call in enumerate(group, start=1)
        }
        self._extended_by: dict[str, list[PastCall]] = {call.id: [] for call in group}
        for call in group:
            if base := dependencies[call.id].base:
                self._extended_by[base.id].append(call)

    def all(self) -> tuple[Node, ...]:
        """In order of arrival, each after the pause before it."""
        return tuple(node for call in self._group for node in self._of(call))

    def _of(self, call: PastCall) -> list[Node]:
        dependency = self._dependencies[call.id]
        prefix, known_tokens = self._known(call, dependency)
        waited = (
            dependency.after
            if dependency.previous is None or dependency.extends
            else (dependency.previous, *dependency.after)
        )
        node = Node(
            id=self._names[call.id],
            agent=call.agent[:MAX_TEXT],
            new_tokens=call.prompt_tokens - known_tokens,
            output_tokens=call.output_tokens,
            predecessors=() if dependency.base is None else (self._names[dependency.base.id],),
            after=tuple(self._names[other.id] for other in waited),
            prefix=prefix,
            tool=self._tool(call),
            parent=None if dependency.parent is None else self._names[dependency.parent.id],
            keeps_answer=self._keeps_answer(call),
        )
        return _with_pause(node, self._pause_s(call, dependency))

    def _known(self, call: PastCall, dependency: CallDependency) -> tuple[Prefix | None, int]:
        """The shared text that its prompt begins with, and how much of its prompt stands elsewhere."""
        if dependency.base is not None:
            kept_tokens = dependency.base.output_tokens if self._keeps_answer(dependency.base) else 0
            return None, dependency.base.prompt_tokens + kept_tokens
        tokens = self._prefixes.get(call.agent, 0)
        if not 0 < tokens <= call.prompt_tokens:
            return None, 0
        return Prefix(call.agent[:MAX_TEXT], tokens), tokens

    def _keeps_answer(self, call: PastCall) -> bool:
        """Whether the prompts that follow hold its answer as it was.

        They do not where they are too short for it, or where they found all of its prompt in the cache and none of its
        answer: a client sends back what it has parsed, and that need not be the same tokens.
        """
        context_tokens = call.prompt_tokens + call.output_tokens
        is_answer_cached = call.output_tokens > self._block_tokens
        return not any(
            later.prompt_tokens < context_tokens
            or (is_answer_cached and 0 <= call.prompt_tokens - later.cached_tokens < self._block_tokens)
            for later in self._extended_by[call.id]
        )

    def _pause_s(self, call: PastCall, dependency: CallDependency) -> float:
        waited = [other.over_s for other in (dependency.previous, *dependency.after) if other is not None]
        began_s = self._group[0].arrived_s if dependency.parent is None else dependency.parent.finished_s
        return call.arrived_s - max(waited, default=began_s)

    def _tool(self, call: PastCall) -> Tool | None:
        """All tools of `call` as one, from the first start to the last end or to the call that did not wait for it."""
        if not call.tools:
            return None
        inside = [other.over_s for other in self._group if self._dependencies[other.id].parent is call]
        started_s = max(inside, default=min(tool.started_s for tool in call.tools))
        over_s = min([call.over_s, *(later.arrived_s for later in self._extended_by[call.id])])
        estimates = [tool.estimate_s for tool in call.tools if tool.estimate_s is not None]
        return Tool(
            name="+".join(sorted({tool.name for tool in call.tools}))[:MAX_TEXT],
            duration_s=max(0.0, over_s - started_s),
            result_tokens=0,
            estimate_s=max(estimates) if len(estimates) == len(call.tools) else None,
        )


def _with_pause(node: Node, pause_s: float) -> list[Node]:
    if pause_s < SHORTEST_PAUSE_S:
        return [node]
    pause = Node(
        id=f"{node.id}{_PAUSE}",
        agent="pause",
        new_tokens=0,
        output_tokens=0,
        predecessors=node.predecessors,
        after=node.after,
        tool=Tool("pause", pause_s, 0),
        parent=node.parent,
    )
    if node.predecessors:
        return [pause, replace(node, predecessors=(pause.id,), after=())]
    return [pause, replace(node, after=(pause.id,))]


def main(argv: Sequence[str]) -> int:
    """`tokencake sim record`: write the workload of a real run.

    Raises:
        WorkloadError: the run cannot be read or makes no workload.
    """
    parser = argparse.ArgumentParser(
        prog="tokencake sim record",
        description="Turn a real run into a workload for `tokencake sim --workload`.",
        epilog="Calls without a hint (ordinary traffic) are not in the state and so not in the workload.",
    )
    add = parser.add_argument
    add(
        "source",
        help="the URL of an engine or proxy, or a file with its answer to GET /v1/tokencake/state or a list of pages",
    )
    add("out", type=Path, help="write the workload there")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="of the engine; default: $OPENAI_API_KEY")
    arguments = parser.parse_args(argv)
    run = read_past(arguments.source, arguments.api_key)
    workload = workload_of(run)
    arguments.out.write_text(json.dumps(to_json(workload), indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.out}: {_summary(run, workload)}")
    return 0


def _summary(run: PastRun, workload: Workload) -> str:
    left_out = {
        "calls that were aborted or are not finished": run.unfinished_calls,
        "tool calls without an end": run.open_tools,
        "calls that the state does not show": run.hidden_calls,
    }
    tools = sum(len(call.tools) for call in run.calls)
    lines = [
        f"{len(workload.apps)} applications, {len(run.calls)} calls, {tools} tool calls",
        *(f"  left out: {count} {what}" for what, count in left_out.items() if count),
        "  calls without a hint (ordinary traffic) are not in the state",
    ]
    return "\n".join(lines)
