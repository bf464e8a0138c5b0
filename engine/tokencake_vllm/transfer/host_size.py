"""Size of the host memory in KV blocks, and the models whose KV can be moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from tokencake.time_scheduler.settings import TimeSettings

HOST_BLOCKS: Final = "host_blocks"
"""Extra configuration: slots in place of `host_kv_gib`, for tests and the simulator."""


def block_bytes_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Bytes of one block over all layers and all ranks; the scheduler and every rank come to the same.

    vLLM gives the scheduler the first rank's tensors, and describes unlike layers to it by the first of them only: so
    the size comes from the tensors. Of pipeline stages, which know their own layers only, the longest counts.
    """
    layers = sum(len(group.layer_names) for group in kv_cache_config.kv_cache_groups)
    if tensors := kv_cache_config.kv_cache_tensors:
        rank_bytes = tensors[0].size // kv_cache_config.num_blocks  # all name the size of the one allocation
    else:
        rank_bytes = kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes * layers
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        total, stages = vllm_config.model_config.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
        spans = (get_pp_indices(total, stage, stages) for stage in range(stages))
        rank_bytes = rank_bytes // layers * max(end - begin for begin, end in spans)
    return rank_bytes * parallel.world_size


def host_slots(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: TimeSettings) -> int:
    """How many blocks the host memory holds; every rank has its part of each."""
    extra: dict[str, Any] = {}
    if vllm_config.kv_transfer_config is not None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    if HOST_BLOCKS in extra:
        return int(extra[HOST_BLOCKS])
    return int(settings.host_kv_gib * 2**30 / block_bytes_of(vllm_config, kv_cache_config))


def unsupported_reason(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why the KV of this model cannot be moved, or None."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups; only one of full attention is known"
    spec = groups[0].kv_cache_spec
    for layer in spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else (spec,):
        if type(layer) is not FullAttentionSpec:
            return f"a layer's KV cache is {type(layer).__name__}, not FullAttentionSpec"
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1:
        return "with context parallelism a block's tokens lie on several ranks"
    return None
