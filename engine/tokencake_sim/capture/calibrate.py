"""Calibration: fits the rates of the step cost to the measured steps of a running engine.

A step is a JSON object: `prefill_tokens`, `decode_seqs`, `kv_tokens_read` (context lengths of the decoding calls added
up) and `seconds`. An engine keeps its steps with `--additional-config '{"tokencake": {"measure": {"steps": 5000}}}'`.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from tokencake_sim.capture.source import read_pages
from tokencake_sim.device.cost import StepLoad
from tokencake_sim.device.profiles import PROFILES
from tokencake_sim.errors import SimulationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencake_sim.device.profiles import Profile

MIN_STEPS: Final = 20
PAGE_STEPS: Final = 1_000
MAX_STEPS: Final = 100_000
STEPS_PATH: Final = "/v1/tokencake/steps"


class CalibrationError(SimulationError, ValueError):
    """The measured steps do not determine the rates."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What one step computed, and how long it took."""

    load: StepLoad
    seconds: float


def read_steps(source: str, api_key: str | None = None) -> list[MeasuredStep]:
    """Read them from an engine's URL, or from a file with its answer to `GET /v1/tokencake/steps`.

    Raises:
        SourceError: it cannot be read.
        CalibrationError: it holds no steps.
    """
    try:
        entries = read_pages(source, STEPS_PATH, "steps", PAGE_STEPS, MAX_STEPS, api_key)["steps"]
        steps = []
        for entry in entries:
            load = StepLoad(int(entry["prefill_tokens"]), int(entry["decode_seqs"]), int(entry["kv_tokens_read"]))
            steps.append(MeasuredStep(load, float(entry["seconds"])))
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{source} is no list of steps: {error!r}") from None
    return steps


def fit(steps: Sequence[MeasuredStep], profile: Profile) -> Profile:
    """`profile` with the fixed cost, the prefill rate and the bandwidth that fit `steps` best.

    The weights are read in every step, so they cannot be told from the fixed cost: reading them is charged at the
    bandwidth that the KV is read with, and the fixed cost is what is left. Errors count relative to the step's length.

    Raises:
        CalibrationError: there are too few steps, or none that prefills, or none that only decodes.
    """
    if len(steps) < MIN_STEPS:
        raise CalibrationError(f"{len(steps)} steps are too few to fit three rates; measure {MIN_STEPS} or more")
    loads = np.array([[1.0, s.load.prefill_tokens, s.load.kv_tokens_read] for s in steps])
    if not loads[:, 1].any() or loads[:, 1].all():
        raise CalibrationError("the steps must both prefill and only decode; measure a mixed load")
    seconds = np.array([step.seconds for step in steps])
    weight = 1.0 / np.maximum(seconds, 1e-9)
    per_step, per_prefill, per_kv = _non_negative(loads * weight[:, None], seconds * weight)
    kv_bytes = profile.model.kv_bytes_per_token
    bandwidth = kv_bytes / per_kv if per_kv > 0 else profile.memory_bytes_per_s
    # Weights that take longer than a whole step would leave a negative fixed cost.
    bandwidth = max(bandwidth, profile.weight_bytes / max(per_step, 1e-9))
    return replace(
        profile,
        fixed_s=float(max(0.0, per_step - profile.weight_bytes / bandwidth)),
        prefill_tokens_per_s=float(1.0 / per_prefill) if per_prefill > 0 else profile.prefill_tokens_per_s,
        memory_bytes_per_s=float(bandwidth),
        source=f"{len(steps)} measured steps of a running engine; the rest as in {profile.name}",
    )


def _non_negative(left: np.ndarray, right: np.ndarray) -> tuple[float, float, float]:
    """Least squares with no coefficient below 0: what would be negative is left out, and the others fitted again."""
    used = list(range(left.shape[1]))
    found = np.zeros(left.shape[1])
    while used:
        solution = np.linalg.lstsq(left[:, used], right, rcond=None)[0]
        if (solution >= 0).all():
            found[used] = solution
            break
        used = [column for column, value in zip(used, solution, strict=True) if value >= 0]
    return float(found[0]), float(found[1]), float(found[2])


def mean_error(steps: Sequence[MeasuredStep], profile: Profile) -> float:
    """Mean relative error of the profile's step times."""
    return float(np.mean([abs(profile.cost.step_s(s.load) / s.seconds - 1) for s in steps if s.seconds > 0]))


def main(argv: Sequence[str]) -> int:
    """`tokencake sim calibrate`: print the fitted profile as JSON.

    Raises:
        CalibrationError: the steps do not determine the rates.
    """
    parser = argparse.ArgumentParser(prog="tokencake sim calibrate", description=__doc__)
    parser.add_argument("steps", help="the URL of an engine, or a file with its answer to GET /v1/tokencake/steps")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="of the engine")
    parser.add_argument(
        "--profile", choices=PROFILES, default="cpu-smollm2-135m", help="what is not fitted is taken from"
    )
    arguments = parser.parse_args(argv)
    steps = read_steps(arguments.steps, arguments.api_key)
    fitted = fit(steps, PROFILES[arguments.profile])
    print(json.dumps({**asdict(fitted), "mean_step_error": mean_error(steps, fitted)}, indent=1))
    return 0
