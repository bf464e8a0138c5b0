"""Ways to the end, joins and slack: from graphs, and from the order of calls where there is none."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.forecast.topology import remaining_s, topology_of
from tokencake.protocol import Graph, Hint
from tokencake.space_scheduler.applications import AppTracker, LiveRequest

DIAMOND = Graph(
    "diamond",
    {"plan": {}, "left": {}, "right": {}, "fix": {}, "merge": {}},
    (("plan", "left"), ("plan", "right"), ("right", "fix"), ("left", "merge"), ("fix", "merge")),
)
TALK = Graph(
    "talk", {"agent": {}, "tools": {}, "report": {}}, (("agent", "tools"), ("tools", "agent"), ("agent", "report"))
)


class Engine:
    """Runs calls on a clock of its own; each takes `took_s` from its first slot to its end."""

    def __init__(self, *graphs: Graph) -> None:
        named = {graph.graph: graph for graph in graphs}
        self.applications = AppTracker(named.get, answer_quantile=0.8)
        self.now = 100.0
        self.made = 0

    def begin(self, node: str, app: str = "app", session: str | None = None, **fields: object) -> LiveRequest:
        self.made += 1
        fields.setdefault("agent", node)
        hint = Hint(session=session or f"{app}/{node}", app=app, call=f"c{self.made}", node=node, **fields)
        call = self.applications.add(f"r{self.made}", hint, prompt_tokens=9, max_tokens=9, now=self.now)
        self.applications.start(call.request_id, self.now)
        return call

    def end(self, call: LiveRequest, *, is_aborted: bool = False) -> None:
        self.applications.end(call.request_id, 9, is_aborted=is_aborted, now=self.now)

    def run(self, node: str, took_s: float, gap_s: float = 0.0, **fields: object) -> LiveRequest:
        call = self.begin(node, **fields)
        self.now += took_s
        self.end(call)
        self.now += gap_s
        return call

    def slack(self) -> dict[str, float | None]:
        calls = [call for call in self.applications.calls.values() if call.branch is not None]
        return {call.branch.node_key[1]: self.applications.slack_s(call, self.now) for call in calls}

    def is_critical(self, call: LiveRequest) -> bool:
        return self.applications.is_critical(call, self.now)

    def diamond(self, app: str) -> None:
        """One whole application: the right branch is the longer one, mostly because of its tool."""
        graph = {"app": app, "graph": "diamond"}
        self.run("plan", 4.0, **graph)
        left, right = self.begin("left", **graph), self.begin("right", **graph)
        self.now += 5.0
        self.end(left)
        self.end(right)
        self.now += 20.0
        self.run("fix", 5.0, **graph)
        self.run("merge", 3.0, **graph)


# --- paths ------------------------------------------------------------------------------------------


def path_costs(cost: dict[str, float], *edges: tuple[str, str]) -> dict[str, float]:
    return remaining_s(topology_of(cost, edges), cost.__getitem__)


def test_the_way_to_the_end_is_the_longest_one() -> None:
    cost = {"a": 1.0, "b": 5.0, "c": 2.0, "d": 1.0}

    assert path_costs(cost, ("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")) == {"a": 7.0, "b": 6.0, "c": 3.0, "d": 1.0}


def test_who_enters_a_loop_anywhere_has_all_of_it_before_him() -> None:
    cost = {"start": 1.0, "agent": 2.0, "tools": 3.0, "end": 4.0}
    edges = (("start", "agent"), ("agent", "tools"), ("tools", "agent"), ("agent", "end"))

    assert path_costs(cost, *edges) == {"start": 10.0, "agent": 9.0, "tools": 9.0, "end": 4.0}


def test_a_graph_may_be_deeper_than_the_stack_and_one_large_loop() -> None:
    names = [str(number) for number in range(5_000)]
    line = list(itertools.pairwise(names))

    assert path_costs(dict.fromkeys(names, 1.0), *line)["0"] == 5_000
    assert path_costs(dict.fromkeys(names, 1.0), *line, (names[-1], "0"))["2500"] == 5_000


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=30))
def test_no_node_is_nearer_to_the_end_than_what_follows_it(pairs: list[tuple[int, int]]) -> None:
    edges = [(str(one), str(other)) for one, other in pairs]
    topology = topology_of(map(str, range(8)), edges)
    found = remaining_s(topology, lambda _: 1.0)

    assert all(found[before] >= found[behind] for before, behind in edges)
    assert all(behind in topology.descendants[before] for before, behind in edges)
    assert sorted(name for loop in topology.sccs for name in loop) == [str(number) for number in range(8)]


# --- remaining --------------------------------------------------------------------------------------


def test_tools_and_code_between_calls_are_on_the_way() -> None:
    engine = Engine(DIAMOND)
    for number in range(30):
        engine.diamond(f"app{number}")
    right, left = engine.begin("right", app="x", graph="diamond"), engine.begin("left", app="x", graph="diamond")

    assert right.remaining_s == pytest.approx(5 + 20 + 5 + 3, rel=0.1)
    assert left.remaining_s == pytest.approx(5 + 3, rel=0.1)
    assert right.service_s == pytest.approx(5 + 5 + 3, rel=0.1)


def test_a_loop_costs_its_expected_rounds_less_those_that_were_had() -> None:
    engine = Engine(TALK)
    for number in range(30):
        for _ in range(6):
            engine.run("agent", 2.0, 1.0, app=f"app{number}", graph="talk", session=f"s{number}")
        engine.run("report", 5.0, app=f"app{number}", graph="talk")
    rounds = [engine.run("agent", 2.0, 1.0, app="x", graph="talk", session="s") for _ in range(9)]

    assert rounds[0].remaining_s == pytest.approx(6 * 3 + 5, rel=0.2)
    assert rounds[3].remaining_s == pytest.approx(3 * 3 + 5, rel=0.2)
    # Unexpected rounds: at least this one, and the report, are to come.
    assert rounds[8].remaining_s >= 2.0


def test_a_node_from_which_no_call_ever_comes_costs_nothing() -> None:
    graph = Graph("g", {"a": {}, "code": {}, "b": {}}, (("a", "code"), ("code", "b")))
    engine = Engine(graph)
    for number in range(60):
        engine.run("a", 2.0, app=f"app{number}", graph="g")
        engine.run("b", 3.0, app=f"app{number}", graph="g")

    assert engine.begin("a", app="x", graph="g").remaining_s == pytest.approx(5.0, rel=0.05)


def test_an_application_without_a_graph_is_learned_from_the_order_of_its_calls() -> None:
    engine = Engine()
    for number in range(60):
        for agent, took_s in (("planner", 2.0), ("writer", 6.0), ("critic", 1.0)):
            engine.run(agent, took_s, 0.5, app=f"app{number}")
    found = {agent: engine.run(agent, 1.0, app="x").remaining_s for agent in ("planner", "writer", "critic")}

    assert found["planner"] == pytest.approx(2 + 6 + 1 + 1.0, rel=0.15)
    assert found["writer"] == pytest.approx(6 + 1 + 0.5, rel=0.15)
    assert found["critic"] == pytest.approx(1.0, rel=0.3)


def test_kinds_of_applications_that_begin_with_other_agents_are_learned_apart() -> None:
    engine = Engine()
    for number in range(60):
        engine.run("planner", 1.0, app=f"long{number}")
        engine.run("writer", 50.0, app=f"long{number}")
        engine.run("chatter", 1.0, app=f"short{number}")

    assert engine.begin("planner", app="x").remaining_s > 30
    assert engine.begin("chatter", app="y").remaining_s < 3


def test_without_a_graph_what_the_client_says_remains_counts() -> None:
    engine = Engine()

    assert engine.begin("a", remaining=3).remaining_s == 3 * engine.applications.tenants.get("").graph_stats.call_s
    assert engine.begin("b").remaining_s == 0.0


def test_a_sub_agent_has_the_way_of_the_agent_that_waits_for_it_before_it() -> None:
    team = Graph("team", {"boss": {}, "report": {}}, (("boss", "report"),))
    worker = Graph("worker", {"dig": {}}, ())
    engine = Engine(team, worker)
    for number in range(40):
        boss = engine.run("boss", 2.0, app=f"app{number}", graph="team")
        engine.run("dig", 3.0, app=f"app{number}", graph="worker", parent_call=boss.hint.call)
        engine.run("report", 10.0, app=f"app{number}", graph="team")
    boss = engine.run("boss", 2.0, app="x", graph="team")

    assert engine.begin("dig", app="x", graph="worker", parent_call=boss.hint.call).remaining_s > 12
    assert engine.begin("dig", app="y", graph="worker").remaining_s == pytest.approx(3.0, rel=0.1)


def test_several_answers_of_one_call_are_one_visit() -> None:
    engine = Engine(TALK)
    hint = Hint(session="s", app="a", call="c", graph="talk", node="agent")
    for number in range(4):
        engine.applications.add(f"{number}_r", hint, prompt_tokens=1, max_tokens=9, now=1.0)
    (app,) = {call.app.id: call.app for call in engine.applications.calls.values()}.values()

    assert app.visits == {("talk", "agent"): 1}


# --- slack ------------------------------------------------------------------------------------------


@pytest.fixture
def learned() -> Engine:
    engine = Engine(DIAMOND)
    for number in range(30):
        engine.diamond(f"app{number}")
    engine.run("plan", 4.0, app="x", graph="diamond")
    return engine


def test_the_longest_branch_is_critical_and_the_other_has_its_lead_to_spare(learned: Engine) -> None:
    left, right = learned.begin("left", app="x", graph="diamond"), learned.begin("right", app="x", graph="diamond")
    slack = learned.slack()

    assert (slack["right"], learned.is_critical(right), learned.is_critical(left)) == (0.0, True, False)
    assert slack["left"] == pytest.approx(25.0, rel=0.1)


def test_a_branch_in_a_tool_is_waited_for_too_until_its_next_call_joins(learned: Engine) -> None:
    left = learned.begin("left", app="x", graph="diamond")
    learned.run("right", 5.0, app="x", graph="diamond")
    learned.now += 1.0
    assert learned.slack()["left"] == pytest.approx(25.0, abs=3.0)
    learned.end(left)
    learned.begin("fix", app="x", graph="diamond")
    assert learned.slack() == {"fix": 0.0}  # left waits at the join, with nothing left to do before it


def test_the_critical_path_is_found_anew_when_a_branch_ends(learned: Engine) -> None:
    left, right = learned.begin("left", app="x", graph="diamond"), learned.begin("right", app="x", graph="diamond")
    assert not learned.is_critical(left)
    learned.end(right, is_aborted=True)

    assert learned.slack() == {"left": None}  # no other branch feeds the join any more


def test_a_call_behind_a_join_has_no_siblings(learned: Engine) -> None:
    learned.run("left", 5.0, app="x", graph="diamond")
    learned.run("right", 5.0, app="x", graph="diamond")
    learned.run("fix", 5.0, app="x", graph="diamond")
    learned.begin("merge", app="x", graph="diamond")

    assert learned.slack() == {"merge": None}


def test_branches_of_a_send_are_siblings_although_they_are_one_node() -> None:
    engine = Engine()
    calls = [engine.begin("map", session=f"s{number}", join="reduce", remaining=1) for number in range(3)]
    engine.now += 2.0
    calls.append(engine.begin("map", session="s3", join="reduce", remaining=1))
    engine.slack()

    assert [call.slack_s for call in calls] == [2.0, 2.0, 2.0, 0.0]


def test_siblings_that_say_nothing_of_a_join_and_have_no_graph_are_not_guessed_at() -> None:
    engine = Engine()
    engine.begin("a")
    engine.begin("b")

    assert engine.slack() == {"a": None, "b": None}


def test_an_application_that_is_everywhere_at_once_has_no_slack_and_costs_little() -> None:
    engine = Engine()
    for number in range(2_000):
        engine.begin(f"node{number}", join=f"j{number % 7}", remaining=1)

    assert set(engine.slack().values()) == {None}


def test_what_never_comes_back_is_waited_for_no_longer(learned: Engine) -> None:
    learned.run("right", 5.0, app="x", graph="diamond")
    learned.now += 10_000.0
    learned.begin("left", app="x", graph="diamond")

    assert learned.slack() == {"left": None}


def test_a_call_is_critical_as_its_client_says_where_nothing_is_measured(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    calls = call("a", critical=True), call("b"), call(None)

    assert [applications.is_critical(one, 0.0) for one in calls] == [True, False, False]


# --- whatever clients say ---------------------------------------------------------------------------

NAMES = st.sampled_from([None, "a", "b", "c", "left", "right", "merge"])
CALLS = st.fixed_dictionaries(
    {"app": st.sampled_from("xy"), "session": st.sampled_from("stu")},
    optional={
        "node": NAMES,
        "agent": NAMES,
        "graph": st.sampled_from(["diamond", "talk", "unknown"]),
        "join": st.sampled_from(["j", "merge"]),
        "parent_call": st.sampled_from(["c1", "c2", "itself"]),
        "call": st.sampled_from(["c1", "c2", "itself"]),
        "remaining": st.sampled_from([0, 1, 1_000_000]),
        "reuse": st.sampled_from(["final", "extends"]),
    },
)


@given(st.lists(st.tuples(CALLS, st.integers(0, 6), st.floats(0, 1e5), st.booleans()), max_size=40))
def test_whatever_clients_say_ways_are_finite_slack_is_no_debt_and_somebody_is_critical(trace: list) -> None:
    applications = AppTracker({graph.graph: graph for graph in (DIAMOND, TALK)}.get, answer_quantile=0.8)
    now = 0.0
    for number, (fields, ended, wait_s, is_aborted) in enumerate(trace):
        now += wait_s
        call = applications.add(f"r{number}", Hint(**fields), prompt_tokens=1, max_tokens=1, now=now)
        assert 0.0 <= call.service_s <= call.remaining_s + 1e-6 < float("inf")
        applications.start(call.request_id, now)
        for live in applications.calls.values():
            slack_s = applications.slack_s(live, now)
            assert slack_s is None or slack_s >= 0.0
        for name in list(applications.calls)[:ended]:
            applications.end(name, 1, is_aborted=is_aborted, now=now)
    for name in list(applications.calls):
        applications.end(name, 1, is_aborted=False, now=now)
    assert all(not app.answers for _, app in applications._apps.items())
