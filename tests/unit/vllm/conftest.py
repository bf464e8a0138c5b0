"""vLLM's scheduler in this process: no weights, no worker, a made-up model output."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.stall_bench import Bench
from tests.harness.tenancy import SECRET
from tokencake.protocol.tenancy import SECRET_VARIABLE

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ[SECRET_VARIABLE] = SECRET

BLOCK_SIZE = 16


@pytest.fixture
def bench(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """`bench(**options)` is one scheduler with the Time Scheduler on, its worker and its clock."""

    def make(**options: Any) -> Bench:
        return Bench(tiny_model, monkeypatch, **options)

    return make


@pytest.fixture(scope="session")
def make_scheduler(tiny_model: Path) -> Callable[..., Any]:
    """`make(cls, is_async=False, num_blocks=200)` builds a scheduler of class `cls`."""
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    def make(create: Callable[..., Any], *, is_async: bool = False, num_blocks: int = 200) -> Any:
        config = VllmConfig(
            model_config=ModelConfig(model=str(tiny_model), dtype="bfloat16", max_model_len=2_048),
            scheduler_config=SchedulerConfig(
                max_num_seqs=16,
                max_num_batched_tokens=512,
                max_model_len=2_048,
                is_encoder_decoder=False,
                async_scheduling=is_async,
            ),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
        )
        config.scheduler_config.async_scheduling = is_async  # the CPU platform switches it off
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        return create(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )

    return make


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Any]:
    """`make(id, tokens, hint=None)` builds a request whose output is at most `max_tokens` long."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)

    def make(
        request_id: str, tokens: list[int], hint: Any = None, max_tokens: int = 4, cache_salt: str | None = None
    ) -> Any:
        params = SamplingParams(
            ignore_eos=True, max_tokens=max_tokens, extra_args=None if hint is None else {"tokencake": hint}
        )
        return Request(request_id, tokens, params, None, arrival_time=0.0, block_hasher=hasher, cache_salt=cache_salt)

    return make


@pytest.fixture(scope="session")
def step() -> Callable[[Any], Any]:
    """One engine step with a model that always says 7; returns what was scheduled."""
    from vllm.v1.outputs import ModelRunnerOutput

    def one_step(scheduler: Any) -> Any:
        output = scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        requests = [scheduler.requests[request_id] for request_id in ids]
        sampled = [[7] if request.num_computed_tokens >= request.num_tokens else [] for request in requests]
        model_output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        scheduler.update_from_output(output, model_output)
        return output

    return one_step
