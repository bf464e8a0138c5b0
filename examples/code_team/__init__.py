"""A team of code-writing agents in LangGraph, on a real vLLM with a small model."""
