"""The pure core of TokenCake: the wire contract and what the engine knows of its agents.

Standard library only; no clock, no randomness, no I/O, no vLLM. Time and state are arguments, decisions are values.
"""

__version__ = "0.1.0"

SUPPORTED_VLLM = ((0, 31), (0, 33))
"""The oldest and the newest (major, minor) of vLLM whose scheduler the plug-in knows."""
