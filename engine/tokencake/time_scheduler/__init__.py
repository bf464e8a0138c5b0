"""Offload and upload of the KV of stalled agents: contracts and settings, prefix index, stall tracker, host tier."""
