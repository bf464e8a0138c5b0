"""Duration of one step on the modelled device.

`step_s = fixed + prefill tokens / prefill rate + (weights + KV read) / memory bandwidth`. The terms add up:
a step that prefills is bound by compute, one that only decodes by memory, and a chunked prefill does both in turn.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one batch makes the device do."""

    prefill_tokens: int
    """Tokens computed that are not the next token of a decoding call: first prefill and recomputation."""
    decode_seqs: int
    kv_tokens_read: int
    """Context lengths of the decoding calls added up: each of them reads its own KV."""


@dataclass(frozen=True, slots=True)
class StepCostModel:
    """Rates of one model on one device."""

    fixed_s: float
    """Launch, sampling and scheduling of any step."""
    prefill_tokens_per_s: float
    weight_bytes: float
    memory_bytes_per_s: float
    kv_bytes_per_token: int

    def step_s(self, load: StepLoad) -> float:
        """Seconds of a step; a step without tokens costs nothing."""
        if not load.prefill_tokens and not load.decode_seqs:
            return 0.0
        read_bytes = self.weight_bytes + load.kv_tokens_read * self.kv_bytes_per_token
        prefill_s = load.prefill_tokens / self.prefill_tokens_per_s
        return self.fixed_s + prefill_s + read_bytes / self.memory_bytes_per_s
