import json
import re
from pathlib import Path

import pytest

from tokencake_sim import GENERATORS, App, WorkloadError, generate, load_workload
from tokencake_sim.workload.arrivals import ARRIVALS, arrival_times
from tokencake_sim.workload.graph import chains, places
from tokencake_sim.workload.load import parse_workload, to_json
from tokencake_sim.workload.tokens import texts_of

WORKLOADS = Path(__file__).resolve().parents[4] / "benchmarks" / "workloads"


def one_app(*nodes):
    return {"version": 1, "name": "test", "apps": [{"id": "a", "nodes": list(nodes)}]}


def call(name, *predecessors, **more):
    return {"id": name, "new_tokens": 10, "output_tokens": 5, "predecessors": list(predecessors), **more}


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([call("x", "y"), call("y", "x")], "node x waits for itself"),
        ([call("x", "nobody")], "node x follows nobody, which is not a node"),
        (
            [call("x", tool={"name": "t", "duration_s": -1})],
            "node x, tool has duration_s '-1'; expected a number from 0",
        ),
        ([call("x", after=["y"]), call("y", after=["x"])], "node x waits for itself"),
        ([call("x", after=["nobody"])], "node x follows nobody, which is not a node"),
        ([call("x"), call("x")], "node x is defined twice"),
        ([call("x", new_tokens=-4)], "node x has new_tokens '-4'; expected a whole number"),
        ([call("x", colour="red")], "node x has unknown fields: colour"),
        ([call("x", parent="y"), call("y")], "node x works inside y, which is not a node with a tool"),
        ([call("x", parent="y", tool={"name": "t", "duration_s": 1}), call("y", parent="x")], "works inside y"),
        ([], "has no nodes"),
    ],
)
def test_a_workload_that_cannot_run_is_refused_with_file_node_and_reason(nodes, words):
    with pytest.raises(WorkloadError, match=re.escape(words)) as caught:
        parse_workload(one_app(*nodes), "mine.json")

    assert str(caught.value).startswith("mine.json: ")


def test_agents_that_work_inside_each_other_are_refused():
    tool = {"name": "t", "duration_s": 1}
    with pytest.raises(WorkloadError, match="circle"):
        parse_workload(one_app(call("x", parent="y", tool=tool), call("y", "x", parent="x", tool=tool)), "mine.json")


def test_a_file_that_is_no_json_is_refused_with_its_name(tmp_path):
    (tmp_path / "bad.json").write_text("{")

    with pytest.raises(WorkloadError, match=r"bad\.json: the file is not JSON"):
        load_workload(tmp_path / "bad.json")


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generated_workload_survives_the_way_through_json(name):
    workload = generate(name, count=5, qps=1.0, seed=2)

    again = parse_workload(json.loads(json.dumps(to_json(workload))), workload.source)

    assert again == workload


def test_the_loader_and_the_published_schema_name_the_same_fields():
    schema = json.loads((WORKLOADS / "schema.json").read_text())["$defs"]
    written = to_json(load_workload(WORKLOADS / "two-agents.json"))["apps"]

    assert {key for app in written for key in app} == set(schema["app"]["properties"])
    assert {key for app in written for node in app["nodes"] for key in node} <= set(schema["node"]["properties"])


def test_a_cycle_is_unrolled_and_its_name_stands_for_the_last_turn():
    (app,) = parse_workload(one_app(call("x", iterations=3), call("y", "x")), "mine.json").apps

    assert [node.id for node in app.nodes] == ["x@1", "x@2", "x", "y"]
    assert texts_of(app)["y"].prompt_tokens == 3 * 15 + 10


def test_the_coding_pipeline_has_the_published_shape():
    (app,) = generate("code-writer", count=1, qps=1.0, seed=1).apps
    calls = [node for node in app.nodes if not node.is_local]
    prompts = [texts_of(app)[node.id].prompt_tokens for node in calls]

    assert len(app.nodes) == 29
    assert sum(len(node.predecessors) for node in app.nodes) == 36
    assert len(calls) == 27
    assert sum(node.output_tokens for node in calls) == 6_464
    assert sum(node.tool is not None for node in calls) == 18
    assert sum(prompts) / len(prompts) == pytest.approx(9_060, rel=0.001)


def test_in_the_flood_a_few_are_critical_and_most_of_the_work_is_not():
    apps = generate("flood", count=40, qps=1.0, seed=1).apps
    written = {True: 0, False: 0}
    for app in apps:
        for node in app.nodes:
            written[bool(node.critical)] += node.output_tokens

    assert [app.kind for app in apps[:4]] == ["batch", "critical", "batch", "batch"]
    assert written[False] > 3 * written[True]


def test_each_prompt_of_the_coding_pipeline_extends_the_context_of_its_first_predecessor():
    (app,) = generate("code-writer", count=1, qps=1.0, seed=1).apps
    texts = texts_of(app)

    for node in app.nodes:
        if node.predecessors:
            context = texts[node.predecessors[0]].context
            assert texts[node.id].prompt[: len(context)] == context


def test_the_research_pipeline_makes_the_published_number_of_calls():
    (app,) = generate("deep-research", count=1, qps=1.0, seed=1).apps

    assert sum(not node.is_local for node in app.nodes) == 32


def test_a_place_counts_calls_and_knows_the_longest_path():
    nodes = (
        parse_workload(one_app(call("a"), call("b", "a"), call("c", "b"), call("d", "a")), "mine.json").apps[0].nodes
    )
    found = places(nodes)

    assert (found["a"].depth, found["a"].remaining, found["a"].out_degree) == (1, 3, 2)
    assert [found[name].is_critical for name in "abcd"] == [True, True, True, False]
    assert (found["d"].fan_out, found["d"].fan_index) == (2, 1)


def nodes_of(*nodes):
    return parse_workload(one_app(*nodes), "mine.json").apps[0].nodes


def test_a_node_that_comes_after_another_waits_for_it_and_takes_none_of_its_text():
    nodes = nodes_of(call("a"), call("b", after=["a"]), call("c", "b"))

    texts = texts_of(App("app", "k", 0.0, nodes))
    assert [texts[name].prompt_tokens for name in "abc"] == [10, 10, 25]
    assert [places(nodes)[name].remaining for name in "abc"] == [3, 2, 1]


def test_an_answer_that_is_not_kept_is_missing_from_the_next_prompt():
    nodes = nodes_of(call("a", keeps_answer=False), call("b", "a"))

    assert texts_of(App("app", "k", 0.0, nodes))["b"].prompt_tokens == 20


def test_calls_that_extend_each_other_form_a_chain_and_every_branch_begins_one():
    tool = {"name": "t", "duration_s": 1}
    nodes = nodes_of(
        call("a"),
        call("b", "a", tool=tool),
        call("left", "b"),
        call("right", "b"),
        call("right2", "right"),
        call("join", "left", "right2"),
        call("inside", "a", parent="b"),
        call("later", after=["join"]),
    )

    members = {
        "a": "ab",
        "left": ["left", "join"],
        "right": ["right", "right2"],
        "inside": ["inside"],
        "later": ["later"],
    }
    assert chains(nodes) == {name: head for head, names in members.items() for name in names}


@pytest.mark.parametrize("kind", ARRIVALS)
def test_arrivals_begin_at_zero_keep_their_rate_and_repeat_with_the_seed(kind):
    times = arrival_times(kind, 400, 2.0, seed=5)

    assert times[0] == 0.0
    assert times == sorted(times) == arrival_times(kind, 400, 2.0, seed=5)
    assert times[-1] == pytest.approx(200.0, rel=0.25)
