"""What a run measures: KV occupancy, steps and latency."""
