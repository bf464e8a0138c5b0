"""Record of one simulated LLM call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokencake_sim.workload.graph import NodePosition
    from tokencake_sim.workload.model import App, Node
    from tokencake_sim.workload.tokens import Texts


@dataclass(slots=True)
class SimCall:
    """One call from its arrival on; times in virtual seconds, None until they come."""

    id: str
    app: App
    node: Node
    place: NodePosition
    texts: Texts
    answer: tuple[int, ...]
    is_after_tool: bool
    arrived_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    answered_tokens: int = 0
    prefilled_tokens: int = 0
    """Prompt tokens computed before the first preemption."""
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    preemptions: int = 0
    computed_to: int = 0
    """The most tokens of it that were in the KV cache at once."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of its full blocks, known when it has finished: what a successor may hit."""
