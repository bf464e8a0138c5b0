import json
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report.page import write_page
from benchmarks.report.plots import gantt, round_up
from tokencake_sim import PROFILES, generate, policy_named, simulate


def test_the_page_has_a_cell_for_each_run_and_its_pictures_are_pictures(tmp_path, run, crowd):
    results = tmp_path / "results"
    results.mkdir()
    found = run(crowd, "stock+host")
    metrics = {**found.metrics, "workload": "code-writer", "qps": 1.0, "variant": "plain"}
    (results / "code-writer_1_stock-with-host_plain.json").write_text(json.dumps(metrics))
    (results / "code-writer_1_stock-with-host_plain.timeline.json").write_text(json.dumps(found.timeline))
    comparison = {
        "calls": 16,
        "calls_with_other_hits": {},
        "hit_tokens": 6_432,
        "real_makespan_s": 13.2,
        "simulated_makespan_s": 12.7,
        "makespan_error": -0.042,
    }
    (results / "validate_cpu.json").write_text(json.dumps({"runs": [comparison]}))
    (results / "validate_server.json").write_text(json.dumps({"runs": [{**comparison, "calls": 18}]}))
    same = {"workload": "mixed", "policy": "stock", "calls": 152, "preemptions": 14, "differs": ""}
    (results / "compare_versions.json").write_text(json.dumps({"versions": ["1", "2"], "runs": [same]}))

    write_page(results, tmp_path / "bench.md")

    page = (tmp_path / "bench.md").read_text()
    assert f"| `stock+host` | - | - | - | - | {metrics['makespan_s']:.0f} /" in page
    assert "published, combined | 677 / 204 / 252" in page
    assert "| 16 | 0 | 6,432 | 13.2 | 12.7 | -4.2 |" in page
    assert "| 18 | 0 | 6,432 | 13.2 | 12.7 | -4.2 |" in page
    assert "| mixed, `stock` | 152 | 14 | nothing |" in page
    pictures = sorted(results.glob("*.svg"))
    assert [path.name for path in pictures] == [
        "gantt-stock-with-host.svg",
        "kv-stock-with-host.svg",
        "latency.svg",
    ]
    for path in pictures:
        assert ET.fromstring(path.read_text()).tag.endswith("svg")
        assert path.name in page


def test_ours_stands_beside_what_it_is_measured_against(tmp_path, run, crowd):
    found = {name: run(crowd, name).metrics for name in ("stock+host", "default")}
    runs = [("code-writer", 1.0, "plain"), ("mixed", 1.0, "plain"), ("code-writer", 1.0, "host-20-gib")]
    runs += [("code-writer", 0.05, "plain")]
    for workload, qps, variant in runs:
        for name, metrics in found.items():
            case = {**metrics, "workload": workload, "qps": qps, "variant": variant}
            (tmp_path / f"{workload}-{qps}-{name}-{variant}.json").write_text(json.dumps(case))

    write_page(tmp_path, tmp_path / "bench.md")

    page = (tmp_path / "bench.md").read_text()
    ratio = f"{found['default']['makespan_s'] / found['stock+host']['makespan_s']:.2f} / "
    assert f"| `default` / `stock+host` | {ratio}" in page
    assert "| crowd | 4 |" in page
    assert "| host-20-gib |" in page
    median_s = found["default"]["ttft_after_tool_s"]["p50"]
    assert f"{median_s:.2f} / " in page.split("## After a tool")[1]


def test_a_flood_shows_what_becomes_of_the_critical(tmp_path):
    metrics = simulate(
        generate("flood", count=4, qps=1.0, seed=1), PROFILES["a800-qwen2.5-14b"], policy_named("default")
    )
    case = {**metrics.metrics, "qps": 1.0, "variant": "plain"}
    (tmp_path / "flood.json").write_text(json.dumps(case))

    write_page(tmp_path, tmp_path / "bench.md")

    latency_s = metrics.metrics["kinds"]["critical"]["app_latency_s"]["mean"]
    assert f"| `default` | {latency_s:.0f} | " in (tmp_path / "bench.md").read_text()


def test_a_gantt_has_a_row_for_each_call(run, crowd):
    calls = [call for call in run(crowd).timeline["calls"] if call["app"] == "app-0"]

    picture = ET.fromstring(gantt("one", calls))

    words = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"plan", "left", "right", "merge"} <= set(words)


@given(st.floats(0.001, 1e7))
def test_an_axis_ends_at_or_just_beyond_its_largest_value(value):
    assert value <= round_up(value) <= max(1.0, 4 * value)
