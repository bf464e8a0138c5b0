"""A made-up device so small that a few short calls are too many for it."""

from tokencake_sim.device.profiles import ModelShape, Profile

SMALL = Profile(
    name="small",
    model=ModelShape(layers=2, kv_heads=2, head_size=32, vocabulary=32_000),
    fixed_s=0.002,
    prefill_tokens_per_s=2_000.0,
    weight_bytes=1e9,
    memory_bytes_per_s=1e11,
    kv_blocks=140,
    block_tokens=16,
    max_model_len=2_048,
    max_batched_tokens=512,
    max_seqs=16,
    async_scheduling=False,
    link_bytes_per_s=1e9,
    host_bytes=1e9,
    source="made up",
)
