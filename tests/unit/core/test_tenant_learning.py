"""What one tenant's calls teach, and how many there are, changes nothing of what is expected of another's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.tenancy import parsed, prefix_of
from tokencake import protocol
from tokencake.forecast.durations import MAX_KEYS, Forecast
from tokencake.forecast.reuse import ReuseProbability
from tokencake.forecast.roles import Role, role_of
from tokencake.policies.default_space import DefaultSpacePolicy
from tokencake.protocol import Graph, Hint
from tokencake.registry.registry import Registry
from tokencake.space_scheduler.applications import AppTracker
from tokencake.space_scheduler.policy import AdmissionState
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake.time_scheduler.stall_tracker import StallTracker

ALICE, BOB = prefix_of("alice"), prefix_of("bob")
GRAPH = Graph("g", {"plan": {}, "work": {}, "report": {}}, (("plan", "work"), ("work", "report")))


def hint_of(tenant: str, number: int = 0, **fields: object) -> Hint:
    """Every tenant uses the same names."""
    names = {"session": f"s{number}", "call": f"c{number}", "app": f"a{number}", "agent": "coder", "node": "work"}
    return parsed(Hint(**{**names, **fields}), tenant)


def test_a_role_is_its_tenants_own() -> None:
    assert role_of(hint_of("alice")) != role_of(hint_of("bob"))
    assert role_of(hint_of("alice")).of_agent.tenant == role_of(None, ALICE).tenant == ALICE


# --- the Time Scheduler -------------------------------------------------------------------------------


class Calls:
    """Calls of tenants that end, wait for a tool and come back, or do not."""

    def __init__(self) -> None:
        self.registry = Registry(has_tenants=True)
        self.tracker = StallTracker(self.registry)
        self.made = 0

    def call(self, tenant: str, tool_s: float, *, comes_back: bool) -> None:
        self.made += 1
        hint = hint_of(tenant, self.made)
        name, keys = f"r{self.made}", [bytes([self.made, 1]), bytes([self.made, 2])]
        self.registry.add_call(name, hint, 64, 0.0)
        self.tracker.arrive(name, keys, hint, 0.0)
        self.tracker.start(name, 0.0)
        self.registry.finish_call(name, 5, is_aborted=False, now=tool_s)
        self.tracker.finish(name, keys, tool_s)
        end = protocol.ToolEnd(hint.call or "", "t", tool="build", duration_s=tool_s)
        assert self.registry.apply(end, 2 * tool_s) == "applied"
        self.tracker.on_event(end)
        for prefix in self.tracker.stalled_at(hint.call or ""):
            if comes_back:
                self.tracker.arrive(f"{name}-again", [*keys, b"more"], hint, 3 * tool_s)
                self.tracker.prefixes.remove(f"{name}-again")
            else:
                self.tracker.give_up(prefix)


def test_the_stalls_of_one_tenant_change_no_forecast_of_another() -> None:
    calls = Calls()
    for _ in range(10):
        calls.call("alice", 2.0, comes_back=True)
    agent, role = role_of(hint_of("alice")).of_agent, role_of(hint_of("alice"))
    keys = [(agent, "build"), (agent, "(answer)"), (role, "(after its tools)")]
    before = [calls.tracker.forecast.stall(key, tool).quantile(0.5) for key, tool in keys]
    probability = calls.tracker.reuse.probability(hint_of("alice"))

    for _ in range(40):
        calls.call("bob", 3_000.0, comes_back=False)

    assert [calls.tracker.forecast.stall(key, tool).quantile(0.5) for key, tool in keys] == before
    assert before[0] == pytest.approx(2.0, rel=0.3)
    assert calls.tracker.reuse.probability(hint_of("alice")) == probability
    assert calls.tracker.reuse.probability(hint_of("bob")) < probability / 2


def test_a_flood_of_names_makes_no_other_tenant_forget() -> None:
    forecast, reuse = Forecast(), ReuseProbability()
    alice = role_of(hint_of("alice"))
    forecast.learn(alice, "build", 2.0)
    reuse.learn(hint_of("alice"), came=False)
    for number in range(MAX_KEYS + 100):
        forecast.learn(Role(f"agent{number}", tenant=BOB), "build", 3_000.0)
        reuse.learn(hint_of("bob", agent=f"agent{number}"), came=True)

    assert forecast.knows(alice, "build")
    assert len(forecast) == MAX_KEYS
    assert reuse.probability(hint_of("alice")) < reuse.probability(hint_of("carol"))


def test_what_was_learned_outlives_the_engine_with_its_tenant() -> None:
    forecast, again = Forecast(), Forecast()
    forecast.learn(role_of(hint_of("alice")), "build", 2.0)
    again.restore(forecast.dump())

    assert again.knows(role_of(hint_of("alice")), "build")
    assert not again.knows(role_of(hint_of("bob")), "build")


def test_a_call_ends_no_stall_of_another_tenant_though_it_sends_the_same_prompt() -> None:
    """As where tenants share cached prefixes, and their blocks have the same hashes."""
    calls = Calls()
    keys = [b"1", b"2"]
    for tenant in ("alice", "bob"):
        hint = hint_of(tenant)
        calls.tracker.arrive(tenant, keys, hint, 0.0)
        calls.tracker.finish(tenant, keys, 1.0)

    assert calls.tracker.arrive("stranger", [*keys, b"3"], hint_of("carol"), 2.0) is None
    assert calls.tracker.arrive("plain", [*keys, b"3"], None, 2.0, prefix_of("dave")) is None
    parent = calls.tracker.arrive("again", [*keys, b"3"], hint_of("bob"), 2.0)
    assert parent is not None
    assert parent.tenant == BOB
    plain = calls.tracker.arrive("own", [*keys, b"3"], None, 2.0, ALICE)
    assert plain is not None
    assert plain.tenant == ALICE


def test_a_flood_of_stalls_makes_no_other_tenants_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.time_scheduler.prefixes.MAX_PREFIXES", 10)
    calls = Calls()
    for number in range(30):
        tenant = "alice" if number < 4 else "bob"
        keys = [bytes([number])]
        calls.tracker.arrive(f"{tenant}{number}", keys, hint_of(tenant, number), 0.0)
        calls.tracker.finish(f"{tenant}{number}", keys, 1.0)
        for prefix in calls.tracker.prefixes.overflow():
            calls.tracker.drop(prefix)

    assert [prefix.tenant for prefix in calls.tracker.prefixes] == [ALICE] * 4 + [BOB] * 6


# --- the Space Scheduler ------------------------------------------------------------------------------


class Engine:
    """Runs calls one by one; each takes as long as it is told."""

    def __init__(self) -> None:
        graphs = {f"{prefix}g": protocol.scoped(GRAPH, prefix) for prefix in (ALICE, BOB)}
        self.applications = AppTracker(graphs.get, answer_quantile=0.8)
        self.made = 0
        self.now = 0.0

    def begin(self, tenant: str, app: str = "a", **fields: object) -> str:
        self.made += 1
        hint = None if fields.get("is_plain") else hint_of(tenant, self.made, app=app, **fields)
        self.applications.add(
            f"r{self.made}", hint, prompt_tokens=9, max_tokens=9_999, now=self.now, tenant=prefix_of(tenant)
        )
        self.applications.start(f"r{self.made}", self.now)
        return f"r{self.made}"

    def run(self, tenant: str, took_s: float, tokens: int, **fields: object) -> None:
        name = self.begin(tenant, **fields)
        self.now += took_s
        self.applications.end(name, tokens, is_aborted=False, now=self.now)


NODES: list[dict[str, object]] = [
    {"graph": "g", "node": "plan"},
    {"graph": "g", "node": "work"},
    {"node": "work"},
    {"node": "nowhere", "remaining": 3},
    {"is_plain": True},
]


def expectations(engine: Engine) -> list[tuple[int, float, float]]:
    """Of alice's next calls: tokens of the answer, seconds to the end of the application, seconds for each token."""
    found = []
    for fields in NODES:
        call = engine.applications.calls[engine.begin("alice", app="next", **fields)]
        found.append((call.expected_tokens, call.remaining_s, call.app.tenant.token_s))
        engine.applications.end(call.request_id, 1, is_aborted=True, now=engine.now)
    return found


@pytest.mark.parametrize("has_run", [False, True], ids=["a new tenant", "a tenant that has run"])
def test_the_calls_of_one_tenant_change_nothing_of_what_is_expected_of_another(has_run: bool) -> None:
    def world(also: Callable[[Engine], None]) -> list[tuple[int, float, float]]:
        engine = Engine()
        for number in range(20 if has_run else 0):
            for fields in NODES:
                engine.run("alice", 2.0, 40, app=f"a{number}", **fields)
        also(engine)
        return expectations(engine)

    def flood(engine: Engine) -> None:
        for number in range(100):
            for fields in NODES:
                engine.run("bob", 900.0, 9_000, app=f"a{number}", **fields)

    assert world(flood) == world(lambda _: None)


def test_a_flood_of_applications_and_graphs_makes_no_other_tenant_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.space_scheduler.applications._MAX_KEPT", 20)
    monkeypatch.setattr("tokencake.forecast.graph_stats._MAX_NODES", 20)
    engine = Engine()
    engine.run("alice", 2.0, 40, app="mine", graph="own", node="n")
    first_seen_s = engine.now - 2.0
    graph_stats = engine.applications.tenants.get(ALICE).graph_stats
    for number in range(200):
        engine.run("bob", 1.0, 40, app=f"a{number}", graph=f"g{number}", node=f"n{number}")

    call = engine.applications.calls[engine.begin("alice", app="mine")]
    assert call.app.first_seen_s == first_seen_s
    assert engine.applications.known_apps <= 22
    assert graph_stats.service_s((f"{ALICE}own", "n")) == 2.0


def test_calls_of_one_tenant_without_a_hint_do_not_set_back_those_of_another() -> None:
    def levels(bobs: int) -> int:
        engine = Engine()
        engine.begin("alice", is_plain=True)
        for _ in range(bobs):
            call = engine.applications.calls[engine.begin("bob", is_plain=True)]
            call.prompt_tokens = 10_000
        policy = DefaultSpacePolicy(SpaceSettings())
        policy.begin(engine.applications, AdmissionState(1_000, 500), now=0.0)
        return policy._context.unhinted_levels[ALICE]

    assert levels(0) == levels(50) == 0
