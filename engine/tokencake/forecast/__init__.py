"""Estimates learned from past calls: durations, reuse, output lengths, costs, and the order of an agent's graph."""
