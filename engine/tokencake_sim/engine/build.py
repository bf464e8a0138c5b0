"""Construction of vLLM's scheduler without a model, a worker or a device.

The configuration objects are vLLM's own; the model is a `config.json` of the right shape in a folder of its own.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake_sim.device.profiles import ModelShape


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the scheduler is told at its start."""

    model: ModelShape
    kv_blocks: int
    block_tokens: int
    max_model_len: int
    max_batched_tokens: int
    max_seqs: int
    async_scheduling: bool


@dataclass(frozen=True, slots=True)
class ConnectorSpec:
    """The KV connector that vLLM loads: a class by name and the extra configuration it reads."""

    class_name: str
    module: str
    extra: tuple[tuple[str, float | int | str | bool], ...] = ()


def quiet_vllm() -> None:
    """Keep vLLM's start-up chatter off the terminal, unless it was asked for; call before vLLM is imported."""
    if os.environ.get("VLLM_LOGGING_LEVEL") not in {"DEBUG", "INFO"}:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)


@cache
def seed_block_hashes() -> None:
    """Draw the seed of vLLM's block hashes, once per process: with a new seed, earlier requests would match no more."""
    from vllm.utils.hashing import sha256  # noqa: PLC0415  heavy, and an optional dependency
    from vllm.v1.core.kv_cache_utils import init_none_hash  # noqa: PLC0415  as above

    init_none_hash(sha256)


@lru_cache(maxsize=8)
def _model_config(model: ModelShape, max_model_len: int) -> ModelConfig:
    from vllm.config import ModelConfig  # noqa: PLC0415  heavy, and an optional dependency

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.head_size * model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": 4 * model.head_size * model.kv_heads,
        "num_attention_heads": model.kv_heads,
        "num_key_value_heads": model.kv_heads,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory(prefix="tokencake-sim-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return ModelConfig(
            model=folder, skip_tokenizer_init=True, dtype="bfloat16", seed=0, max_model_len=max_model_len
        )


def build_scheduler(
    scheduler_class: type[Scheduler],
    limits: EngineLimits,
    *,
    policy: Literal["fcfs", "priority"] = "fcfs",
    connector: ConnectorSpec | None = None,
    additional_config: dict[str, Any] | None = None,
) -> Scheduler:
    """A scheduler with prefix caching, chunked prefill and statistics on.

    Args:
        scheduler_class: vLLM's, or a subclass.
        limits: of the model and the device.
        policy: vLLM's own scheduling policy.
        connector: the KV connector, if there is one.
        additional_config: the plug-in's settings.
    """
    import torch  # noqa: PLC0415  as above
    from vllm.config import (  # noqa: PLC0415  as above
        CacheConfig,
        DeviceConfig,
        KVTransferConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.kv_cache_interface import (  # noqa: PLC0415  as above
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager  # noqa: PLC0415  as above

    seed_block_hashes()
    transfer = None
    if connector is not None:
        transfer = KVTransferConfig(
            kv_connector=connector.class_name,
            kv_connector_module_path=connector.module,
            kv_role="kv_both",
            kv_connector_extra_config=dict(connector.extra),
        )
    config = VllmConfig(
        model_config=_model_config(limits.model, limits.max_model_len),
        scheduler_config=SchedulerConfig(
            max_num_seqs=limits.max_seqs,
            max_num_batched_tokens=limits.max_batched_tokens,
            max_model_len=limits.max_model_len,
            enable_chunked_prefill=True,
            async_scheduling=limits.async_scheduling,
            policy=policy,
            is_encoder_decoder=False,
        ),
        cache_config=CacheConfig(block_size=limits.block_tokens, enable_prefix_caching=True),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=transfer,
        additional_config=additional_config or {},
    )
    # The CPU platform switches both off or over; the modelled device is not a CPU.
    config.scheduler_config.async_scheduling = limits.async_scheduling
    config.cache_config.block_size = limits.block_tokens
    config.cache_config.num_gpu_blocks = limits.kv_blocks
    layers = [f"layers.{layer}" for layer in range(limits.model.layers)]
    spec = FullAttentionSpec(
        block_size=limits.block_tokens,
        num_kv_heads=limits.model.kv_heads,
        head_size=limits.model.head_size,
        dtype=torch.bfloat16,
    )
    return scheduler_class(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=limits.kv_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=limits.block_tokens,
        hash_block_size=limits.block_tokens,
        log_stats=True,
    )
