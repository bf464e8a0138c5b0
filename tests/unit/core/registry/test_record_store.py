"""The registry's bounds: memory by tenant, and what goes first."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest

from tokencake import protocol
from tokencake.protocol import Hint, Stage
from tokencake.registry.record_store import Limits
from tokencake.registry.registry import Registry

MARK = "::"


def call(registry: Registry, name: str, tenant: str = "", *, is_over: bool = True, **hint: object) -> bool:
    """A call `name` with a session of its own."""
    own = f"{tenant}{MARK}" if tenant else ""
    said = protocol.scoped(Hint(session=f"s-{name}", call=name, **hint), own)
    is_kept = registry.add_call(f"{own}{name}", said, 10, 1.0)
    if is_over and is_kept:
        registry.finish_call(f"{own}{name}", 1, is_aborted=False, now=1.0)
    return is_kept


def tools(registry: Registry, name: str, count: int = 128, stages: int = 32) -> list[str]:
    """Tool calls of `name` that are as large as the contract allows; returns what became of each."""
    outcomes = []
    for number in range(count):
        text = f"{name}-{number}-".ljust(protocol.MAX_ID_CHARS, "x")
        parts = tuple(Stage(f"{text}{part}"[-protocol.MAX_ID_CHARS :], 1.0) for part in range(stages))
        outcomes.append(registry.apply(protocol.ToolStart(name, text, text[::-1], 2.0, 3.0, parts), 2.0))
    return outcomes


def many_calls(registry: Registry) -> None:
    for number in range(300):
        call(registry, f"call {number}", agent=f"agent {number}", app=f"app {number}", parent_call=f"parent {number}")


def many_tools(registry: Registry) -> None:
    for number in range(4):
        call(registry, f"call {number}")
        tools(registry, f"call {number}")


def many_small_tools(registry: Registry) -> None:
    for number in range(20):
        call(registry, f"call {number}")
        for tool in range(100):
            registry.apply(protocol.ToolStart(f"call {number}", f"{number}-{tool}", f"tool {number}-{tool}"), 2.0)


def many_expected_tools(registry: Registry) -> None:
    for number in range(300):
        call(registry, f"call {number}", expects_tools={f"tool {number} {n}": n + 0.5 for n in range(20)})


def many_graphs(registry: Registry) -> None:
    for number in range(30):
        nodes = {f"node {number} {n}": {"kind": f"kind {number} {n}", "weight": n + 0.5} for n in range(50)}
        edges = tuple((f"from {number} {n}", f"to {number} {n}") for n in range(100))
        registry.apply(protocol.Graph(f"graph {number}", nodes, edges, {f"join {number}": (f"a {number}",)}), 1.0)


def many_waits(registry: Registry) -> None:
    for number in range(100):
        call(registry, f"call {number}")
        for kind in range(16):
            registry.apply(protocol.StallStart(f"s-call {number}", f"kind {number} {kind}".ljust(200), 2.5), 2.0)


def many_stages(registry: Registry) -> None:
    many_small_tools(registry)
    for number in range(20):
        for tool in range(100):
            text = f"stage {number} {tool}".ljust(protocol.MAX_ID_CHARS)
            registry.apply(protocol.ToolProgress(f"call {number}", f"{number}-{tool}", stage=text), 3.0)


FILLINGS = [many_calls, many_tools, many_small_tools, many_expected_tools, many_graphs, many_waits, many_stages]


@pytest.mark.parametrize("fill", FILLINGS)
def test_the_estimate_is_near_what_the_interpreter_allocates(fill: Callable[[Registry], None]) -> None:
    registry = Registry(Limits(kept_mib=10_000))
    gc.collect()
    tracemalloc.start()
    try:
        fill(registry)
        gc.collect()
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    estimate = registry.drain()["gauges"]["registry_bytes"]
    assert allocated / 1.5 < estimate < allocated * 2


def test_everything_that_is_kept_stays_within_the_memory_that_is_allowed() -> None:
    registry = Registry(Limits(kept_mib=8))
    for number in range(100):
        call(registry, f"c{number}")
        tools(registry, f"c{number}", count=16)
    assert registry.drain()["gauges"]["registry_bytes"] <= 8 * 2**20
    assert "c99" in registry.calls
    assert "c0" not in registry.calls


def test_a_tenant_that_floods_the_registry_loses_its_own_records_only() -> None:
    registry = Registry(Limits(kept_mib=8, sessions=200, calls=300), has_tenants=True)
    for number in range(20):
        call(registry, f"quiet-{number}", "alice", app=f"app-{number}")
    for number in range(2_000):
        call(registry, f"loud-{number}", "bob", app=f"app-{number}")
    for number in range(40):
        tools(registry, f"bob{MARK}loud-{1_960 + number}", count=16)
    assert all(f"alice{MARK}quiet-{number}" in registry.calls for number in range(20))
    assert all(f"alice{MARK}app-{number}" in registry.apps for number in range(20))
    assert len(registry.sessions) <= 200


def test_one_tenant_of_several_may_take_its_share_of_the_memory() -> None:
    registry = Registry(Limits(kept_mib=8, tenant_share=0.25), has_tenants=True)
    for number in range(40):
        call(registry, f"c{number}", "bob")
        tools(registry, f"bob{MARK}c{number}", count=16)
    assert registry.drain()["gauges"]["registry_bytes"] <= 2 * 2**20


def test_graphs_of_one_tenant_push_out_no_graph_of_another() -> None:
    registry = Registry(Limits(kept_mib=1), has_tenants=True)
    registry.apply(protocol.scoped(protocol.Graph("g", {"a": {}}, (("a", "b"),)), f"alice{MARK}"), 1.0)
    for number in range(2_000):
        nodes = {f"node {number} {n}": {} for n in range(20)}
        flood = protocol.scoped(protocol.Graph(str(number), nodes, ()), f"bob{MARK}")
        assert registry.apply(flood, 1.0) == "applied"
    assert f"alice{MARK}g" in registry.graphs
    assert len(registry.graphs) < 200


def test_graphs_that_one_tenant_has_not_described_are_asked_of_that_tenant_only() -> None:
    registry = Registry(has_tenants=True)
    call(registry, "a", "alice", graph="g")
    for number in range(50):
        call(registry, f"b{number}", "bob", graph=str(number))
    assert registry.unknown_graphs(f"alice{MARK}") == [f"alice{MARK}g"]
    assert all(graph.startswith("bob") for graph in registry.unknown_graphs(f"bob{MARK}"))


def test_calls_in_the_engine_are_never_forgotten_and_beyond_them_hints_are_refused() -> None:
    registry = Registry(Limits(kept_mib=1))
    kept = [name for name in map(str, range(2_000)) if call(registry, name, is_over=False)]
    assert 100 < len(kept) < 2_000
    assert list(registry.calls) == kept
    for name in kept:
        registry.finish_call(name, 1, is_aborted=False, now=2.0)
    assert call(registry, "later")


def test_a_tool_call_beyond_the_memory_is_refused_and_known_ones_still_end() -> None:
    registry = Registry(Limits(kept_mib=1))
    call(registry, "c", is_over=False)
    outcomes = tools(registry, "c")
    assert outcomes[0] == "applied"
    assert outcomes[-1] == "invalid"
    first = next(iter(registry.calls["c"].tools))
    assert registry.apply(protocol.ToolEnd("c", first), 3.0) == "applied"


def test_a_session_that_lives_on_loses_its_oldest_calls() -> None:
    registry = Registry(Limits(kept_mib=1, calls_per_session=10_000))
    for number in range(1_000):
        registry.add_call(f"c{number}", Hint(session="s", call=f"c{number}", agent="x" * 200), 10, 1.0)
        if number:
            registry.finish_call(f"c{number - 1}", 1, is_aborted=False, now=1.0)
    assert "s" in registry.sessions
    assert "c999" in registry.calls
    assert "c0" not in registry.calls
    assert registry.drain()["gauges"]["registry_bytes"] <= 2**20


def test_when_all_is_forgotten_nothing_is_accounted() -> None:
    registry = Registry(Limits(idle_s=10))
    call(registry, "c", app="a", graph="g")
    tools(registry, "c", count=3, stages=2)
    registry.add_call("later", Hint(session="later", call="later"), 10, 100.0)
    registry.finish_call("later", 1, is_aborted=False, now=100.0)
    registry.add_call("last", Hint(session="last", call="last"), 10, 1_000.0)
    assert list(registry.sessions) == ["last"]
    alone = Registry()
    alone.add_call("last", Hint(session="last", call="last"), 10, 1_000.0)
    assert registry.drain()["gauges"]["registry_bytes"] == alone.drain()["gauges"]["registry_bytes"]


def test_waits_count_against_the_memory_and_those_beyond_it_are_refused() -> None:
    registry = Registry(Limits(kept_mib=1, waits_per_session=1_000))
    call(registry, "c", is_over=False)
    outcomes = [
        registry.apply(protocol.StallStart("s-c", f"{number}".ljust(protocol.MAX_ID_CHARS, "\U0001f382")), 2.0)
        for number in range(1_000)
    ]
    assert (outcomes[0], outcomes[-1]) == ("applied", "invalid")
    assert registry.apply(protocol.StallEnd("s-c", next(iter(registry.sessions["s-c"].waits))), 3.0) == "applied"
    assert registry.drain()["gauges"]["registry_bytes"] < 1.01 * 2**20
