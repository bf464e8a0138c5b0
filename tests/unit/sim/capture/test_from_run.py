import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tokencake_sim import WorkloadError, load_workload
from tokencake_sim.capture.from_run import workload_of
from tokencake_sim.capture.past_calls import read_past
from tokencake_sim.cli import main
from tokencake_sim.errors import SourceError

NOON_S = 1_700_000_000.0


def call(name, arrived, finished, prompt, output=20, tools=(), **more):
    """One call as the state shows it; times in seconds after noon."""
    fields = {
        "call": name,
        "session": "s",
        "app": "run",
        "agent": "writer",
        "graph": None,
        "node": "n",
        "parent_call": None,
        "parent_tool_call": None,
        "status": "finished",
        "scheduled": NOON_S + arrived,
        "queue_s": 0.0,
        "preemptions": 0,
        "cached_tokens": {"device": 0, "host": 0},
        **more,
    }
    return {
        **fields,
        "arrived": NOON_S + arrived,
        "finished": None if finished is None else NOON_S + finished,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "tools": list(tools),
    }


def tool(name, start, end, estimate=None):
    times = {key: None if value is None else NOON_S + value for key, value in (("start", start), ("end", end))}
    return {"tool_call": name, "tool": name, "duration_s": None, "status": "ok", "estimate_s": estimate, **times}


@pytest.fixture
def record(tmp_path):
    def recorded(*calls, **more):
        path = tmp_path / "state.json"
        path.write_text(json.dumps({"v": 1, "apps": {}, "sessions": {}, "calls": calls, **more}))
        return read_past(str(path))

    return recorded


def nodes_of(run):
    (app,) = workload_of(run).apps
    return {node.id: node for node in app.nodes}


def test_calls_of_a_session_follow_each_other_and_add_what_their_prompts_grew_by(record):
    first = call("a", 0.0, 1.0, 100, tools=[tool("search", 1.0, 3.0, 2.5), tool("ask", 1.25, 4.0, 1.0)])
    nodes = nodes_of(record(first, call("b", 4.0, 5.0, 180)))

    assert list(nodes) == ["1-writer", "2-writer"]
    assert (nodes["1-writer"].new_tokens, nodes["1-writer"].output_tokens) == (100, 20)
    assert nodes["2-writer"].predecessors == ("1-writer",)
    assert nodes["2-writer"].new_tokens == 180 - 100 - 20
    recorded = nodes["1-writer"].tool
    assert (recorded.name, recorded.duration_s, recorded.estimate_s) == ("ask+search", 3.0, 2.5)


def test_an_estimate_that_some_tools_lack_is_none(record):
    first = call("a", 0.0, 1.0, 100, tools=[tool("search", 1.0, 3.0, 2.5), tool("ask", 1.0, 4.0)])

    assert nodes_of(record(first))["1-writer"].tool.estimate_s is None


def test_an_answer_for_which_the_next_prompt_is_too_short_was_not_kept(record):
    nodes = nodes_of(record(call("a", 0.0, 1.0, 100, output=50), call("b", 1.0, 2.0, 130)))

    assert not nodes["1-writer"].keeps_answer
    assert nodes["2-writer"].new_tokens == 30


@pytest.mark.parametrize(("cached", "is_kept"), [(96, False), (128, True), (32, True)], ids=["prompt", "both", "less"])
def test_an_answer_of_which_the_cache_knew_nothing_was_not_kept_as_it_was(record, cached, is_kept):
    first = call("a", 0.0, 1.0, 100, output=50)
    second = call("b", 1.0, 2.0, 170, cached_tokens={"device": cached, "host": 0})
    other = call("other", 0.0, 1.0, 50, session="other", app="other", cached_tokens={"device": 32, "host": 0})

    run = record(first, second, other)
    assert workload_of(run).apps[0].nodes[0].keeps_answer == is_kept


def test_a_prompt_that_shrank_begins_anew_after_the_call_before_it(record):
    second = nodes_of(record(call("a", 0.0, 1.0, 100), call("b", 1.0, 2.0, 60)))["2-writer"]

    assert (second.predecessors, second.after, second.new_tokens) == ((), ("1-writer",), 60)


def test_branches_come_after_the_call_before_them_and_the_join_after_the_branches(record):
    nodes = nodes_of(
        record(
            call("plan", 0.0, 1.0, 100),
            call("left", 1.0, 2.0, 50, session="l"),
            call("right", 1.01, 3.0, 50, session="r"),
            call("join", 3.0, 4.0, 200),
            call("report", 4.0, 5.0, 30, session="report"),
        )
    )

    assert [node.after for node in nodes.values()] == [
        *((), ("1-writer",), ("1-writer",)),
        *(("2-writer", "3-writer"), ("4-writer",)),
    ]
    assert nodes["4-writer"].predecessors == ("1-writer",)


def test_a_sub_agent_works_inside_the_tool_call_that_waits_for_it(record):
    nodes = nodes_of(
        record(
            call("boss", 0.0, 1.0, 100, tools=[tool("ask_helper", 1.0, 5.5)]),
            call("inner", 1.0, 2.0, 40, session="h", agent="helper", parent_call="boss", tools=[tool("t", 2.0, 4.0)]),
            call("inner2", 4.0, 5.0, 90, session="h", agent="helper", parent_call="boss"),
            call("end", 5.5, 6.0, 150),
        )
    )

    assert [node.parent for node in nodes.values()] == [None, "1-writer", "1-writer", None]
    assert nodes["1-writer"].tool.duration_s == 0.5
    assert nodes["3-helper"].predecessors == ("2-helper",)


def test_time_without_call_or_tool_is_a_pause_that_the_engine_does_not_hear_of(record):
    nodes = nodes_of(record(call("a", 0.0, 1.0, 100), call("b", 31.0, 32.0, 140)))

    pause = nodes["2-writer~pause"]
    assert (pause.is_local, pause.tool.duration_s) == (True, 30.0)
    assert (pause.predecessors, nodes["2-writer"].predecessors) == (("1-writer",), ("2-writer~pause",))


def test_the_turns_of_one_thread_are_one_application(record):
    run = record(
        call("a", 0.0, 1.0, 100), call("c", 0.5, 2.0, 70, session="t", app="x"), call("b", 1.0, 2.0, 140, app="2")
    )

    assert [(app.id, len(app.nodes), app.arrival_s) for app in workload_of(run).apps] == [
        ("run", 2, 0.0),
        ("x", 1, 0.5),
    ]


def test_a_session_of_no_application_is_one_itself(record):
    apps = workload_of(record(call("a", 0.0, 1.0, 100, app=None), call("b", 1.0, 2.0, 140, app=None))).apps

    assert [(app.id, len(app.nodes)) for app in apps] == [("s", 2)]


def test_what_first_calls_of_an_agent_found_in_the_cache_is_a_prefix_that_they_share(record):
    run = record(
        call("a", 0.0, 1.0, 100, app="1", session="1"),
        call("b", 1.0, 2.0, 120, app="2", session="2", cached_tokens={"device": 32, "host": 32}),
        call("c", 2.0, 3.0, 120, app="3", session="3", cached_tokens={"device": 112, "host": 0}),
    )

    prefixes = [
        (node.prefix.key, node.prefix.tokens, node.new_tokens) for app in workload_of(run).apps for node in app.nodes
    ]
    assert prefixes == [("writer", 64, 36), ("writer", 64, 56), ("writer", 64, 56)]


def test_a_recorded_run_can_be_simulated_and_what_was_left_out_is_counted(record, tmp_path, capsys):
    record(
        call("a", 0.0, 1.0, 100, tools=[tool("t", 1.0, 2.0), tool("open", 1.0, None)]),
        call("b", 2.0, 3.0, 150),
        call("lost", 3.0, 4.0, 190, status="aborted"),
        call("live", 5.0, None, 190, status="running"),
        totals={"calls": 9},
    )
    out, metrics = tmp_path / "out.json", tmp_path / "metrics.json"

    assert main(["record", str(tmp_path / "state.json"), str(out)]) == 0
    shown = capsys.readouterr().out
    assert "1 applications, 2 calls, 1 tool calls" in shown
    assert "left out: 2 calls that were aborted or are not finished" in shown
    assert "left out: 1 tool calls without an end" in shown
    assert "left out: 5 calls that the state does not show" in shown

    command = ["--workload", str(out), "--profile", "cpu-smollm2-135m", "--json", str(metrics)]
    assert main(command) == 0
    assert json.loads(metrics.read_text())["prompt_tokens"] == 250
    assert load_workload(out).apps[0].id == "run"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finished": NOON_S - 5}, "call a has finished '1699999995.0'; expected a time after"),
        ({"prompt_tokens": 0}, "call a has prompt_tokens '0'; expected a whole number from 1"),
        ({"status": "asleep"}, "call a has status 'asleep'; expected one of waiting"),
        ({"cached_tokens": 7}, "call a, cached_tokens is '7'; expected an object"),
        ({"tools": [{**tool("t", 2.0, 1.0)}]}, "call a, tool call has end"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_with_file_call_and_reason(record, change, words):
    with pytest.raises(WorkloadError, match=r"state\.json: .*" + re.escape(words)):
        record({**call("a", 0.0, 1.0, 100), **change})


def test_a_state_without_finished_calls_is_refused(record):
    with pytest.raises(WorkloadError, match="has no finished call with a hint"):
        workload_of(record(call("a", 0.0, None, 100, status="running")))


def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path, capsys):
    assert main(["record", str(tmp_path / "none.json"), str(tmp_path / "out.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err


class _Engine(BaseHTTPRequestHandler):
    def do_GET(self):
        is_known = self.headers["Authorization"] == "Bearer secret"
        body = json.dumps({"calls": [call("a", 0.0, 1.0, 100)]}).encode() if is_known else b"{}"
        self.send_response(200 if is_known and self.path == "/v1/tokencake/state?limit=200" else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def engine():
    with HTTPServer(("127.0.0.1", 0), _Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_running_engine_is_asked_with_the_key(engine):
    assert [past.id for past in read_past(engine, "secret").calls] == ["a"]


def test_all_pages_of_a_state_are_read(monkeypatch, tmp_path):
    calls = [call(f"c{number}", float(number), number + 0.5, 100) for number in range(5)]
    pages = {
        "?limit=200": {"calls": calls[3:], "totals": {"calls": 5}, "next": 1764.25},
        "?limit=200&before=1764.25": {"calls": [], "next": 1763.5},
        "?limit=200&before=1763.5": {"calls": calls[:3], "next": None},
    }
    monkeypatch.setattr(
        "tokencake_sim.capture.source._fetch",
        lambda url, path, key: json.dumps(pages[path.removeprefix("/v1/tokencake/state")]),
    )
    past = read_past("http://engine")
    assert [one.id for one in past.calls] == ["c0", "c1", "c2", "c3", "c4"]
    assert past.hidden_calls == 0

    saved = tmp_path / "pages.json"
    saved.write_text(json.dumps(list(pages.values())))
    assert [one.id for one in read_past(str(saved)).calls] == ["c0", "c1", "c2", "c3", "c4"]


def test_an_engine_whose_pages_never_end_is_read_up_to_a_bound(monkeypatch):
    asked = []

    def fetch(url, path, key):
        asked.append(path)
        return json.dumps({"calls": [call(f"c{len(asked)}", 0.0, 1.0, 100)], "next": 1.0})

    monkeypatch.setattr("tokencake_sim.capture.source._fetch", fetch)
    assert len(read_past("http://engine").calls) == len(asked) == 50


def test_an_engine_that_wants_a_key_is_named_with_the_way_out(engine):
    with pytest.raises(SourceError, match=r"127\.0\.0\.1.*answers 401 .*give --api-key"):
        read_past(engine)


def test_an_engine_that_is_not_there_is_named():
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:9.* cannot be read"):
        read_past("http://127.0.0.1:9")
