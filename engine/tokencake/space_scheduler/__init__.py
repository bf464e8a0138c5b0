"""Admission, order and preemption of requests: contract and settings, applications, seniority, growth, explanations."""
