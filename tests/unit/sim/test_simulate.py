import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokencake_sim import App, DeadlockError, NeverFitsError, Node, RunOptions, Tool, Workload, WorkloadError
from tokencake_sim.policies import POLICIES, Policy
from tokencake_sim.simulate import simulate


def workload_of(*nodes):
    return Workload("test", (App("a", "k", 0.0, nodes),), "mine.json")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_input_gives_the_same_trace(run, crowd, policy, is_async):
    first, second = (run(crowd, policy, is_async=is_async) for _ in range(2))

    assert first.trace == second.trace
    assert first.metrics == second.metrics
    assert first.timeline == second.timeline


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_every_call_in_full_and_leaves_nothing_admissible_idle(run, crowd, policy, is_async):
    metrics = run(crowd, policy, is_async=is_async).metrics

    assert (metrics["applications"], metrics["calls"]) == (4, 16)
    assert metrics["output_tokens"] == 4 * (40 + 60 + 60 + 50)
    assert metrics["idle_while_admissible_s"] == 0.0
    assert 0 < metrics["kv_occupancy"] <= metrics["kv_effective_utilisation"] <= 1
    computed = metrics["prefill_tokens"] + sum(metrics["hit_tokens"].values())
    assert computed <= metrics["prompt_tokens"]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_plug_in_that_changes_no_order_runs_as_stock_does(run, crowd, is_async):
    assert run(crowd, "plugin", is_async=is_async).trace == run(crowd, "stock", is_async=is_async).trace


def test_the_plug_in_hears_every_hint_and_event(run, crowd):
    decisions = run(crowd, "plugin").metrics["decisions"]

    assert decisions["hints/accepted"] == 16
    assert decisions["events/tool_start/applied"] == decisions["events/tool_end/applied"] == 12
    assert decisions["events/graph/applied"] == 1
    assert not [name for name in decisions if "error" in name or "void" in name or "invalid" in name]


def test_one_call_alone_takes_what_the_cost_model_says(run, small):
    metrics = run(workload_of(Node("n", "n", new_tokens=100, output_tokens=3))).metrics

    reads = [101, 102]
    decode_s = sum(small.cost.fixed_s + (1e9 + n * small.model.kv_bytes_per_token) / 1e11 for n in reads)
    assert metrics["makespan_s"] == pytest.approx(small.cost.fixed_s + 100 / 2_000 + 0.01 + decode_s)
    assert metrics["steps"] == 3


def test_a_successor_waits_for_the_tool_and_hits_what_its_predecessor_left(run):
    first = Node("first", "n", 160, 17, tool=Tool("t", 5.0, 10))
    calls = run(workload_of(first, Node("second", "n", 5, 4, ("first",)))).timeline["calls"]

    assert calls[1]["arrived_s"] == pytest.approx(calls[0]["finished_s"] + 5.0)
    # The last token of an answer is never fed back, so its KV is not there: 176 of 177 tokens are, 11 blocks.
    assert calls[1]["device_hit_tokens"] == 176


def test_a_node_that_comes_after_another_begins_when_its_tool_is_over_and_hits_nothing(run):
    first = Node("first", "n", 160, 17, tool=Tool("t", 5.0, 10))
    calls = run(workload_of(first, Node("second", "n", 160, 4, after=("first",)))).timeline["calls"]

    assert calls[1]["arrived_s"] == pytest.approx(calls[0]["finished_s"] + 5.0)
    assert calls[1]["device_hit_tokens"] == 0


def test_an_agent_inside_a_tool_call_holds_up_its_end(run):
    boss = Node("boss", "boss", 50, 5, tool=Tool("delegate", 0.5, 20))
    inside = Node("inside", "worker", 50, 5, tool=Tool("t", 3.0, 10), parent="boss")
    calls = {
        call["node"]: call
        for call in run(workload_of(boss, inside, Node("end", "boss", 0, 5, ("boss",)))).timeline["calls"]
    }

    assert calls["inside"]["arrived_s"] == calls["boss"]["finished_s"]
    assert calls["end"]["arrived_s"] == pytest.approx(calls["inside"]["finished_s"] + 3.0 + 0.5)


def test_a_host_tier_gives_back_what_the_device_had_to_forget(run, crowd):
    stock, tier = (run(crowd, policy).metrics for policy in ("stock", "stock+host"))

    assert stock["lost_prefix_tokens"] > 0
    assert tier["hit_tokens"]["host"] > 0
    assert tier["lost_prefix_tokens"] == 0
    assert tier["makespan_s"] < stock["makespan_s"]
    assert tier["transfers"]["to_device"]["bytes"] > 0


def test_a_host_tier_without_room_is_stock(run, crowd):
    assert run(crowd, "stock+host", host_bytes=0.0).trace == run(crowd, "stock").trace


def test_the_bounds_are_bounds(run, crowd):
    makespans = {name: run(crowd, name).metrics["makespan_s"] for name in ("stock", "no-recompute", "unlimited")}

    assert makespans["no-recompute"] < makespans["stock"]
    assert makespans["unlimited"] < makespans["stock"]


def test_ordinary_traffic_carries_no_hint(run, crowd):
    plain = dataclasses.replace(crowd, apps=tuple(dataclasses.replace(app, is_agentic=False) for app in crowd.apps))

    assert run(plain, "plugin").metrics["decisions"] == {"hints/absent": 16}


def test_tool_noise_changes_the_tools_and_estimates_do_not_change_stock(run, crowd):
    quiet = run(crowd).trace

    assert run(crowd, tool_noise=0.5).trace != quiet
    assert run(crowd, estimates="noisy").trace == run(crowd, estimates="none").trace == quiet


def test_a_prompt_longer_than_the_model_is_refused(run):
    with pytest.raises(WorkloadError, match=r"mine\.json: application a, node n has a prompt of 3000 tokens"):
        run(workload_of(Node("n", "n", 3_000, 5)))


def test_a_call_that_can_never_fit_is_reported_and_not_simulated_for_ever(run):
    with pytest.raises(NeverFitsError, match="node n needs 64 KV blocks and can never fit into the 29"):
        run(workload_of(Node("n", "n", 1_000, 24)), kv_blocks=30)


def test_an_application_whose_graph_is_too_large_for_the_wire_runs_without_it(run):
    nodes = [Node(f"n{number}", "n", 20, 2) for number in range(300)]

    assert run(workload_of(*nodes), "default").metrics["calls"] == 300


def test_an_empty_prompt_is_refused(run):
    with pytest.raises(WorkloadError, match="has an empty prompt"):
        run(workload_of(Node("n", "n", 0, 24)))


def test_a_policy_that_admits_nobody_is_caught_with_the_state(small):
    from vllm.v1.core.sched.scheduler import Scheduler

    class Refusing(Scheduler):
        def _handle_blocked_waiting_request(self, request):
            return False

    class Refuse(Policy):
        def scheduler(self, is_async):
            return Refusing

    with pytest.raises(DeadlockError, match=r"no event is pending\n.*139 of 139 blocks free\n  a/n: WAITING, 0 of 20"):
        simulate(workload_of(Node("n", "n", 20, 5)), small, Refuse("refuse", "admits nobody"), RunOptions())


@st.composite
def workloads(draw):
    """A few applications of random shape, none of whose calls is too long for the small device."""
    apps = []
    for number in range(draw(st.integers(1, 3))):
        nodes = []
        for index in range(draw(st.integers(1, 5))):
            before = [node.id for node in nodes]
            after = draw(st.lists(st.sampled_from(before), max_size=2, unique=True)) if before else []
            tool = draw(st.none() | st.builds(Tool, st.just("t"), st.floats(0, 3), st.integers(0, 40)))
            nodes.append(
                Node(f"n{index}", "agent", draw(st.integers(1, 200)), draw(st.integers(1, 40)), tuple(after), tool=tool)
            )
        apps.append(App(f"a{number}", "random", draw(st.floats(0, 2)), tuple(nodes)))
    return Workload("random", tuple(apps), "the test")


@settings(max_examples=25)
@given(workload=workloads(), policy=st.sampled_from(sorted(POLICIES)), is_async=st.booleans())
def test_whatever_the_applications_look_like_each_call_is_answered_once(run, workload, policy, is_async):
    metrics = run(workload, policy, is_async=is_async).metrics

    nodes = [node for app in workload.apps for node in app.nodes]
    assert metrics["applications"] == len(workload.apps)
    assert (metrics["calls"], metrics["output_tokens"]) == (len(nodes), sum(node.output_tokens for node in nodes))
    assert metrics["idle_while_admissible_s"] == 0.0
