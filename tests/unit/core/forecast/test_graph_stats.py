"""What is learned of graphs: means with their rates, edges, and when a graph is measured anew."""

from __future__ import annotations

import pytest

from tokencake.forecast.graph_stats import GraphStats, GraphStatsMemory, PathCosts
from tokencake.protocol import Graph

FIRST_CALL_S = 5.0
RATE = 0.2
LINE = Graph("line", {"a": {}, "b": {}}, (("a", "b"),))
LOOP = Graph("loop", {"a": {}, "b": {}, "c": {}}, (("a", "b"), ("b", "a"), ("b", "c")))


def lore_of(*graphs: Graph) -> GraphStats:
    return GraphStats({graph.graph: graph for graph in graphs}.get)


def learned(graph_stats: GraphStats, graph: str, took_s: dict[str, float], times: int = 16, visits: int = 1) -> None:
    for _ in range(times):
        for node, seconds in took_s.items():
            graph_stats.learn_call((graph, node), seconds, visits)


def path_costs_of(graph_stats: GraphStats, graph: str) -> PathCosts:
    found = graph_stats.path_costs(graph)
    assert found is not None
    return found


def test_the_mean_of_all_calls_moves_a_fifth_of_the_way_to_each() -> None:
    graph_stats = lore_of()
    assert graph_stats.call_s == FIRST_CALL_S
    graph_stats.learn_call(("g", "a"), 15.0, 1)
    assert graph_stats.call_s == pytest.approx(FIRST_CALL_S + RATE * 10.0)
    graph_stats.learn_call(("g", "b"), 2.0, 1)
    assert graph_stats.call_s == pytest.approx(7.0 - RATE * 5.0)


def test_the_first_call_of_a_place_is_its_mean_and_each_later_one_moves_it_a_fifth() -> None:
    graph_stats = lore_of()
    assert graph_stats.service_s(("g", "a")) == FIRST_CALL_S, "that of any call"
    graph_stats.learn_call(("g", "a"), 10.0, 1)
    assert graph_stats.service_s(("g", "a")) == 10.0
    graph_stats.learn_call(("g", "a"), 20.0, 1)
    assert graph_stats.service_s(("g", "a")) == pytest.approx(12.0)
    assert graph_stats.service_s(("g", "b")) == graph_stats.call_s


def test_gaps_move_a_fifth_of_the_way_from_nothing_and_a_guess_teaches_none() -> None:
    graph_stats = lore_of()
    graph_stats.learn_successor(("g", "a"), ("g", "b"), 9.0)
    assert graph_stats.gap_s(("g", "a")) == 0.0, "a place without a call"
    graph_stats.learn_call(("g", "a"), 1.0, 1)
    graph_stats.learn_successor(("g", "a"), ("g", "b"), 10.0)
    assert graph_stats.gap_s(("g", "a")) == pytest.approx(2.0)
    graph_stats.learn_successor(("g", "a"), ("g", "b"), None)
    assert graph_stats.gap_s(("g", "a")) == pytest.approx(2.0)
    graph_stats.learn_successor(("g", "a"), ("g", "b"), 1.0)
    assert graph_stats.gap_s(("g", "a")) == pytest.approx(1.8)
    assert graph_stats.gap_s(("g", "b")) == 0.0


def test_a_described_graph_is_measured_with_what_its_nodes_take_and_wait() -> None:
    graph_stats = lore_of(LINE)
    learned(graph_stats, "line", {"a": 3.0, "b": 4.0})
    graph_stats.learn_successor(("line", "a"), ("line", "b"), 10.0)
    learned(graph_stats, "line", {"b": 4.0}, times=64)
    found = path_costs_of(graph_stats, "line")

    assert found.is_described
    assert found.service_s == {"b": pytest.approx(4.0 * 80 / 64, rel=0.3), "a": found.service_s["b"] + 3.0}
    assert found.remaining_s["a"] == pytest.approx(found.service_s["a"] + 2.0)
    assert found.remaining_s["b"] == found.service_s["b"]


def test_before_any_call_each_node_of_a_described_graph_takes_a_call() -> None:
    assert path_costs_of(lore_of(LINE), "line").remaining_s == {"a": 10.0, "b": 5.0}


def test_a_node_without_calls_takes_nothing_once_enough_calls_of_its_graph_are_known() -> None:
    graph_stats = lore_of(LINE)
    learned(graph_stats, "line", {"b": 4.0}, times=15)
    assert path_costs_of(graph_stats, "line").service_s["a"] == pytest.approx(4.0 + graph_stats.call_s)
    learned(graph_stats, "line", {"b": 4.0}, times=16)
    assert path_costs_of(graph_stats, "line").service_s["a"] == pytest.approx(4.0 * 31 / 31)


def test_a_node_counts_as_often_as_an_application_visits_it() -> None:
    graph_stats = lore_of(LOOP)
    for _ in range(10):
        for visit in range(1, 4):
            graph_stats.learn_call(("loop", "a"), 2.0, visit)
        graph_stats.learn_call(("loop", "c"), 1.0, 1)
    graph_stats.learn_successor(("loop", "a"), ("loop", "c"), 5.0)
    for _ in range(40):
        graph_stats.learn_call(("loop", "c"), 1.0, 1)
    found = path_costs_of(graph_stats, "loop")

    assert found.service_s["c"] == pytest.approx(1.0)
    assert found.service_s["a"] == found.service_s["b"] == pytest.approx(3 * 2.0 + 1.0)
    assert found.remaining_s["a"] == pytest.approx(3 * (2.0 + 1.0) + 1.0)
    assert set(found.cycle("a")) == {"a", "b"}
    assert found.cycle("c") == ()


def test_beyond_64_applications_those_before_count_for_half_and_the_visits_stay() -> None:
    graph_stats = lore_of(LINE)
    for _ in range(64):
        for visit in (1, 2):
            graph_stats.learn_call(("line", "b"), 1.0, visit)
    for _ in range(32):  # from now on an application calls four times
        for visit in (1, 2, 3, 4):
            graph_stats.learn_call(("line", "b"), 1.0, visit)
    learned(graph_stats, "other", {"x": 1.0}, times=1)
    # At the 65th: 129 calls of 65 applications, halved; then 3 calls more of it, and 31 times 4 of one each.
    visits = (129 / 2 + 3 + 31 * 4) / (65 / 2 + 31)
    assert path_costs_of(graph_stats, "line").service_s["b"] == pytest.approx(visits)


def test_a_graph_that_nobody_described_has_no_order_until_sixteen_of_its_calls_have_ended() -> None:
    graph_stats = lore_of()
    learned(graph_stats, "g", {"a": 1.0}, times=15)
    assert graph_stats.path_costs("g") is None
    assert graph_stats.path_costs("unknown") is None
    for _ in range(16):
        graph_stats.learn_call(("g", "a"), 1.0, 1)
        graph_stats.learn_successor(("g", "a"), ("g", "b"), 0.0)
    assert not path_costs_of(graph_stats, "g").is_described


@pytest.mark.parametrize(("followed", "is_edge"), [(1, False), (2, True), (20, True)])
def test_what_follows_a_tenth_of_the_calls_of_a_node_is_an_edge(followed: int, is_edge: bool) -> None:
    graph_stats = lore_of()
    learned(graph_stats, "g", {"a": 1.0, "b": 7.0}, times=20)
    for _ in range(followed):
        graph_stats.learn_successor(("g", "a"), ("g", "b"), 0.0)

    learned(graph_stats, "g", {"b": 7.0}, times=20)  # of the calls of "a", not of "b"

    assert path_costs_of(graph_stats, "g").service_s["a"] == pytest.approx(1.0 + 7.0 * is_edge)


def test_edges_are_learned_inside_one_known_graph_that_nobody_has_described() -> None:
    graph_stats = lore_of(LINE)
    learned(graph_stats, "g", {"a": 1.0, "b": 7.0}, times=20)
    learned(graph_stats, "line", {"a": 1.0, "b": 7.0}, times=20)
    for _ in range(20):
        graph_stats.learn_successor(("g", "a"), ("line", "b"), 0.0)
        graph_stats.learn_successor(("line", "b"), ("line", "a"), 0.0)
        graph_stats.learn_successor(("new", "a"), ("new", "b"), 0.0)

    assert path_costs_of(graph_stats, "g").topology.successors == {"a": (), "b": ()}
    assert path_costs_of(graph_stats, "line").topology.successors == {"a": ("b",), "b": ()}
    learned(graph_stats, "new", {"a": 1.0, "b": 7.0}, times=20)
    assert path_costs_of(graph_stats, "new").topology.successors == {"a": (), "b": ()}


def test_a_graph_learns_a_bounded_number_of_edges_and_goes_on_counting_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.forecast.graph_stats._MAX_EDGES", 2)
    graph_stats = lore_of()
    learned(graph_stats, "g", dict.fromkeys("abcd", 1.0), times=20)
    for behind in "bcddddb":
        graph_stats.learn_successor(("g", "a"), ("g", behind), 0.0)
    for behind in "bc":
        graph_stats.learn_successor(("g", "a"), ("g", behind), 0.0)

    assert path_costs_of(graph_stats, "g").topology.successors["a"] == ("b", "c")


def test_a_graph_is_measured_anew_when_its_calls_have_doubled_and_later_every_64() -> None:
    graph_stats = lore_of(LINE)
    measured_at = []
    known = path_costs_of(graph_stats, "line")
    for count in range(1, 300):
        graph_stats.learn_call(("line", "b"), 1.0, 1)
        if (now := path_costs_of(graph_stats, "line")) is not known:
            measured_at.append(count)
            known = now

    assert measured_at == [1, 3, 7, 15, 31, 63, 127, 191, 255]


def test_a_graph_is_measured_anew_when_it_is_described() -> None:
    graphs: dict[str, Graph] = {}
    graph_stats = GraphStats(graphs.get)
    learned(graph_stats, "line", {"a": 1.0, "b": 1.0}, times=20)
    assert not path_costs_of(graph_stats, "line").is_described
    graphs["line"] = LINE

    assert path_costs_of(graph_stats, "line").is_described
    assert path_costs_of(graph_stats, "line").topology.successors == {"a": ("b",), "b": ()}
    known = path_costs_of(graph_stats, "line")
    learned(graph_stats, "line", {"a": 1.0}, times=64)
    assert path_costs_of(graph_stats, "line") is not known
    assert path_costs_of(graph_stats, "line").topology is known.topology, "what follows from the edges alone stays"


def test_a_graph_that_is_forgotten_takes_its_edges_and_its_count_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.forecast.graph_stats._MAX_NODES", 3)
    memory = GraphStatsMemory()
    graph_stats = GraphStats(lambda _: None, memory, "t::")
    for graph in "wxyz":
        learned(graph_stats, graph, {"a": 1.0}, times=20)
        graph_stats.learn_successor((graph, "a"), (graph, "b"), 1.0)

    assert set(memory.edges) == set(memory.counts) == set(memory.calls) == set("xyz")
    assert memory.counts["z"] == 20
    assert graph_stats.service_s(("w", "a")) == graph_stats.call_s
