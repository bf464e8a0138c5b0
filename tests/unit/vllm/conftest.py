"""Environment of the plug-in's tests, and schedulers with a worker in this process."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.harness.kv_worker import MakeHarness, SchedulerHarness
from tests.harness.tenancy import SECRET
from tokencake.protocol.tenancy import SECRET_VARIABLE

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ[SECRET_VARIABLE] = SECRET


@pytest.fixture
def make_harness(monkeypatch: pytest.MonkeyPatch) -> MakeHarness:
    """`make_harness(**options)` is one scheduler with the Time Scheduler on, its worker and its clock."""

    def make(**options: Any) -> SchedulerHarness:
        return SchedulerHarness(monkeypatch, **options)

    return make
