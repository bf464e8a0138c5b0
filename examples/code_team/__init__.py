"""A code-writing team in LangGraph, on a real vLLM with a real small model."""
