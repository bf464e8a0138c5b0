"""Scheduler and requests for tests: vLLM's own, without a model, a worker or a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokencake import protocol
from tokencake_sim.device.profiles import ModelShape
from tokencake_sim.engine import build

BLOCK_TOKENS = 16
MAX_MODEL_LEN = 2_048
MODEL = ModelShape(layers=1, kv_heads=1, head_size=64, vocabulary=32_000)


def build_scheduler(
    create: Callable[..., Any] | None = None,
    *,
    is_async: bool = False,
    num_blocks: int = 200,
    max_tokens_per_step: int = 512,
    max_seqs: int = 16,
    host_blocks: int | None = None,
    space: dict[str, Any] | None = None,
    time: dict[str, Any] | None = None,
    measure: dict[str, Any] | None = None,
    max_loras: int | None = None,
    **fields: Any,
) -> Any:
    """A scheduler, built as the simulator builds its own.

    Args:
        create: a scheduler class of vLLM, or a factory; the plug-in's factory where it is absent.
        is_async: whether the next step is scheduled while the one before it is under way.
        num_blocks: KV blocks of the device, with vLLM's null block.
        max_tokens_per_step: vLLM's `max_num_batched_tokens`.
        max_seqs: vLLM's `max_num_seqs`.
        host_blocks: blocks of host memory; where it is absent there is no KV connector.
        space: settings of the Space Scheduler.
        time: settings of the Time Scheduler.
        measure: settings of the step log.
        max_loras: adapters that one step may use; where it is absent there are none.
        fields: set in the scheduler's configuration, as they are.
    """

    def create_with_fields(**kwargs: Any) -> Any:
        config = kwargs["vllm_config"]
        if max_loras is not None:
            from vllm.config.lora import LoRAConfig

            config.lora_config = LoRAConfig(max_loras=max_loras, max_cpu_loras=8)
        for name, value in fields.items():
            setattr(config.scheduler_config, name, value)
        return (create or _plug_in())(**kwargs)

    connector = None
    if host_blocks is not None:
        extra = (("host_blocks", host_blocks),)
        connector = build.ConnectorSpec("TokenCakeConnector", "tokencake_vllm.connector", extra)
    limits = build.EngineLimits(
        model=MODEL,
        kv_blocks=num_blocks,
        block_tokens=BLOCK_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        max_batched_tokens=max_tokens_per_step,
        max_seqs=max_seqs,
        async_scheduling=is_async,
    )
    sections = {"space": space, "time": time, "measure": measure}
    given = {name: values for name, values in sections.items() if values is not None}
    factory: Any = create_with_fields
    return build.build_scheduler(factory, limits, connector=connector, additional_config={"tokencake": given})


def _plug_in() -> Callable[..., Any]:
    from tokencake_vllm.scheduler import create_scheduler

    return create_scheduler


def make_request(
    request_id: str, tokens: list[int], hint: Any = None, max_tokens: int = 4, cache_salt: str | None = None
) -> Any:
    """A request with `hint` as its client sends it, for an answer of exactly `max_tokens`."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    extra = None if hint is None else {protocol.HINT_KEY: hint}
    params = SamplingParams(ignore_eos=True, max_tokens=max_tokens, extra_args=extra)
    return Request(
        request_id, tokens, params, None, arrival_time=0.0, block_hasher=_block_hasher(), cache_salt=cache_salt
    )


@cache
def _block_hasher() -> Callable[..., Any]:
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    build.seed_block_hashes()
    return get_request_block_hasher(BLOCK_TOKENS, sha256)
