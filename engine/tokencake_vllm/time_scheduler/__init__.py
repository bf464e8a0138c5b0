"""The Time Scheduler on vLLM: stalls, uploads and the order of free blocks."""
