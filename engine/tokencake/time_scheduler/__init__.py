"""Offload and upload of the KV of stalled agents: which prefixes will be used again, and when."""
