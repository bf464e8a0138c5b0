"""Admission, order and preemption of requests: what an agent's place in its application is worth."""
