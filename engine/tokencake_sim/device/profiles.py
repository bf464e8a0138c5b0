"""Profiles of simulated models and devices, with the source of each number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokencake_sim.device.cost import StepCostModel


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides the size of the KV cache."""

    layers: int
    kv_heads: int
    head_size: int
    bytes_per_value: int = 2
    vocabulary: int = 152_064

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.bytes_per_value


@dataclass(frozen=True, slots=True)
class Profile:
    """One engine: model, device and the limits it was started with."""

    name: str
    model: ModelShape
    fixed_s: float
    prefill_tokens_per_s: float
    weight_bytes: float
    memory_bytes_per_s: float
    kv_blocks: int
    """Including the null block that vLLM keeps for itself."""
    block_tokens: int
    max_model_len: int
    max_batched_tokens: int
    max_seqs: int
    async_scheduling: bool
    link_bytes_per_s: float
    """Device to host and host to device, each."""
    host_bytes: float
    source: str

    @property
    def cost(self) -> StepCostModel:
        """The cost model with this profile's rates."""
        return StepCostModel(
            fixed_s=self.fixed_s,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            weight_bytes=self.weight_bytes,
            memory_bytes_per_s=self.memory_bytes_per_s,
            kv_bytes_per_token=self.model.kv_bytes_per_token,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        return self.model.kv_bytes_per_token * self.block_tokens


_GIB: Final = float(2**30)
_QWEN_14B: Final = ModelShape(layers=48, kv_heads=8, head_size=128)
_QWEN_32B: Final = ModelShape(layers=64, kv_heads=8, head_size=128)
_SMOLLM2_135M: Final = ModelShape(layers=30, kv_heads=3, head_size=64, vocabulary=49_152)

_A800_SOURCE: Final = (
    "limits and link: the published set-up of the TokenCake fork (A800-SXM4-80GB, utilization 0.5, 25 GB/s "
    "measured each way); weights: 14.77 G parameters in BF16; bandwidth: 86 % of the device's 2.04 TB/s; prefill "
    "rate and fixed cost: fitted to the published base at QPS 1.0, of the two values of the fixed cost that fit "
    "(1 and 2 ms) the one that also fits QPS 0.05"
)
_A100_SOURCE: Final = (
    "rates: those of a800-qwen2.5-14b, the same silicon; link: the paper's figure 16 (4,096 tokens there and back"
    " in 63.7 ms); blocks: 80 GB x 0.9 less weights and 2 GB of activations; not compared with a run"
)
_H200_SOURCE: Final = (
    "prefill: the A800 fit scaled by the ratios of dense BF16 rate (989 / 312) and of parameters (14.8 / 32.8), "
    "less 4 %; bandwidth: 86 % of 4.8 TB/s; link: PCIe 5 x16 at 80 %; blocks: 141 GB x 0.9 less weights and 5 GB;"
    " from data sheets, not compared with a run"
)
_CPU_SOURCE: Final = (
    "a shared two-core x86 machine: four fits to measured steps gave 725 to 1,000 tokens/s, 7 to 12 GB/s, 0 to 9 ms; "
    "26.5 MB of KV copied in 5 to 18 ms; replace it by what `tokencake sim calibrate` measures on yours"
)

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile(
            name="a800-qwen2.5-14b",
            model=_QWEN_14B,
            fixed_s=0.002,
            prefill_tokens_per_s=7_600.0,
            weight_bytes=29.5e9,
            memory_bytes_per_s=1.75e12,
            kv_blocks=3_050,
            block_tokens=16,
            max_model_len=32_768,
            max_batched_tokens=8_192,
            max_seqs=1_024,
            async_scheduling=True,
            link_bytes_per_s=25e9,
            host_bytes=100 * _GIB,
            source=_A800_SOURCE,
        ),
        Profile(
            name="a100-qwen2.5-14b",
            model=_QWEN_14B,
            fixed_s=0.002,
            prefill_tokens_per_s=7_600.0,
            weight_bytes=29.5e9,
            memory_bytes_per_s=1.75e12,
            kv_blocks=12_800,
            block_tokens=16,
            max_model_len=32_768,
            max_batched_tokens=8_192,
            max_seqs=1_024,
            async_scheduling=True,
            link_bytes_per_s=24e9,
            host_bytes=100 * _GIB,
            source=_A100_SOURCE,
        ),
        Profile(
            name="h200-qwen2.5-32b",
            model=_QWEN_32B,
            fixed_s=0.002,
            prefill_tokens_per_s=10_400.0,
            weight_bytes=65.5e9,
            memory_bytes_per_s=4.1e12,
            kv_blocks=13_400,
            block_tokens=16,
            max_model_len=32_768,
            max_batched_tokens=8_192,
            max_seqs=1_024,
            async_scheduling=True,
            link_bytes_per_s=50e9,
            host_bytes=100 * _GIB,
            source=_H200_SOURCE,
        ),
        Profile(
            name="cpu-smollm2-135m",
            model=_SMOLLM2_135M,
            fixed_s=0.004,
            prefill_tokens_per_s=900.0,
            weight_bytes=0.27e9,
            memory_bytes_per_s=9e9,
            kv_blocks=200,
            block_tokens=32,
            max_model_len=2_048,
            max_batched_tokens=2_048,
            max_seqs=16,
            async_scheduling=False,
            link_bytes_per_s=5e9,
            host_bytes=1 * _GIB,
            source=_CPU_SOURCE,
        ),
    )
}
