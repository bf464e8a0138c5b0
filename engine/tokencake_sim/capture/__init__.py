"""Workloads and device profiles read from a running engine."""
