import dataclasses
import json

import pytest

from tokencake_sim.capture.calibrate import CalibrationError, MeasuredStep, fit, main, mean_error, read_steps
from tokencake_sim.device.cost import StepLoad
from tokencake_sim.errors import SourceError

LOADS = [StepLoad(n * 37 % 400 if n % 3 == 0 else 0, 1 + n % 7, 500 * (1 + n % 11)) for n in range(60)]


@pytest.fixture
def truth(small):
    return dataclasses.replace(small, fixed_s=0.004, prefill_tokens_per_s=1_234.0, memory_bytes_per_s=2.5e11)


@pytest.fixture
def steps(truth):
    return [MeasuredStep(load, truth.cost.step_s(load)) for load in LOADS]


def test_rates_are_found_again_from_the_steps_they_made(small, truth, steps):
    fitted = fit(steps, small)

    assert mean_error(steps, fitted) < 1e-6
    assert fitted.prefill_tokens_per_s == pytest.approx(truth.prefill_tokens_per_s)
    assert fitted.memory_bytes_per_s == pytest.approx(truth.memory_bytes_per_s)
    assert fitted.fixed_s == pytest.approx(truth.fixed_s)


def test_no_rate_is_negative_however_odd_the_steps(small):
    steps = [MeasuredStep(load, 0.5 - load.kv_tokens_read * 1e-5) for load in LOADS]

    fitted = fit(steps, small)

    assert fitted.fixed_s >= 0
    assert fitted.prefill_tokens_per_s > 0
    assert fitted.memory_bytes_per_s > 0


@pytest.mark.parametrize("chosen", [LOADS[:5], [load for load in LOADS if not load.prefill_tokens]])
def test_steps_that_do_not_determine_the_rates_are_refused(small, chosen):
    with pytest.raises(CalibrationError, match="steps"):
        fit([MeasuredStep(load, 0.1) for load in chosen], small)


def test_the_steps_of_an_engine_become_a_profile(tmp_path, steps, capsys):
    path = tmp_path / "steps.json"
    entries = [{**dataclasses.asdict(step.load), "seconds": step.seconds} for step in steps]
    path.write_text(json.dumps({"v": 1, "steps": entries}))

    assert main([str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["prefill_tokens_per_s"] == pytest.approx(1_234.0)


@pytest.mark.parametrize("text", ["[]", "{", '{"steps": 3}', '{"steps": [{"prefill_tokens": 1}]}'])
def test_what_holds_no_steps_is_refused_by_name(tmp_path, text):
    (tmp_path / "steps.json").write_text(text)

    with pytest.raises(CalibrationError, match=r"steps\.json is no list of steps"):
        read_steps(str(tmp_path / "steps.json"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"steps\.json cannot be read: No such file"):
        read_steps(str(tmp_path / "steps.json"))
