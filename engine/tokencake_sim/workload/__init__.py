"""Workloads: applications, their graphs, prompts and arrivals."""
