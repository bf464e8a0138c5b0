from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.harness.tiny_model import make_tiny_model

# A shared machine is no stopwatch: hypothesis must not fail a test for being slow.
settings.register_profile("shared", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that vLLM loads in seconds."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
