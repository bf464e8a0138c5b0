"""Memory account of the registry, by tenant: the estimated size of each record, and the least recently used one.

Sizes are estimates in bytes of CPython objects: a fixed part for each kind of record, and its texts. Tests compare them
with what the interpreter really allocates.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Final, Literal, TypeAlias

from tokencake.bounded import BoundedDict
from tokencake.protocol import Graph, Hint, Stage
from tokencake.registry.records import CallRecord
from tokencake.registry.timeline import Timeline

RecordKind: TypeAlias = Literal["session", "app", "graph"]

MAX_GRAPHS_ASKED: Final = 16
"""Graphs asked for in one answer to a client."""

SESSION_BYTES: Final = 1_000
CALL_BYTES: Final = 1_300
APP_BYTES: Final = 700
TOOL_BYTES: Final = 250
STAGE_BYTES: Final = 150
WAIT_BYTES: Final = 400
GRAPH_BYTES: Final = 500
ITEM_BYTES: Final = 70
"""An entry of a list or a mapping: its slot, and the number or tuple in it."""


def text_bytes(*texts: str | None) -> int:
    """Bytes of these texts."""
    return sum(sys.getsizeof(text) for text in texts if text)


def call_bytes(hint: Hint) -> int:
    """A call with its hint, without its tool calls."""
    texts = [value for part in fields(hint) if isinstance(value := getattr(hint, part.name), str)]
    tools = hint.expects_tools or {}
    return CALL_BYTES + text_bytes(*texts, *tools) + len(tools) * ITEM_BYTES


def tool_bytes(tool_call: str, tool: str | None, stages: tuple[Stage, ...] | None) -> int:
    """A tool call with its stages."""
    stages = stages or ()
    return TOOL_BYTES + text_bytes(tool_call, tool, *(stage.name for stage in stages)) + len(stages) * STAGE_BYTES


def waits_bytes(kinds: Iterable[str]) -> int:
    """A session's stalls outside tools."""
    return sum(WAIT_BYTES + text_bytes(kind) for kind in kinds)


def graph_bytes(graph: Graph) -> int:
    """A described topology."""
    return GRAPH_BYTES + _nested_bytes([getattr(graph, part.name) for part in fields(graph)])


def _nested_bytes(value: object) -> int:
    if isinstance(value, str):
        return text_bytes(value)
    if isinstance(value, dict):
        return sum(ITEM_BYTES + _nested_bytes(name) + _nested_bytes(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return sum(ITEM_BYTES + _nested_bytes(item) for item in value)
    return ITEM_BYTES


@dataclass(slots=True)
class Account:
    """The records of one tenant in the order of their last use, each with its bytes."""

    records: OrderedDict[tuple[RecordKind, str], int] = field(default_factory=OrderedDict)
    total_bytes: int = 0
    calls: Timeline[CallRecord] = field(default_factory=Timeline)
    unknown_graphs: BoundedDict[str, None] = field(default_factory=lambda: BoundedDict(MAX_GRAPHS_ASKED))
    """Graph hashes that hints named and no event has described."""

    def touch(self, kind: RecordKind, name: str) -> None:
        """The record was used."""
        if (kind, name) in self.records:
            self.records.move_to_end((kind, name))

    @property
    def oldest(self) -> tuple[RecordKind, str] | None:
        """The least recently used record."""
        return next(iter(self.records), None)


class Accounts:
    """The accounts of all tenants. A tenant without records has none."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._by_tenant: dict[str, Account] = {}

    def of(self, tenant: str) -> Account:
        """The account of `tenant`, created where there is none."""
        return self._by_tenant.setdefault(tenant, Account())

    def records_of(self, tenant: str) -> list[tuple[RecordKind, str]]:
        """The records of `tenant`, the least recently used first."""
        account = self._by_tenant.get(tenant)
        return [] if account is None else list(account.records)

    def calls_of(self, tenant: str) -> Timeline[CallRecord]:
        """The calls of `tenant` in order of arrival."""
        account = self._by_tenant.get(tenant)
        return Timeline() if account is None else account.calls

    def add(self, tenant: str, kind: RecordKind, name: str, size: int) -> None:
        """Add `size` bytes to the record; a new one is the most recently used."""
        account = self.of(tenant)
        account.records[kind, name] = account.records.get((kind, name), 0) + size
        account.total_bytes += size
        self.total_bytes += size

    def remove(self, tenant: str, kind: RecordKind, name: str) -> None:
        """The record is gone."""
        account = self.of(tenant)
        size = account.records.pop((kind, name), 0)
        account.total_bytes -= size
        self.total_bytes -= size
        if not account.records:
            del self._by_tenant[tenant]

    @property
    def largest(self) -> Account | None:
        """The account of the tenant with the most bytes."""
        return max(self._by_tenant.values(), key=lambda account: account.total_bytes, default=None)
