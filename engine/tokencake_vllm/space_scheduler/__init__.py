"""The Space Scheduler on vLLM: the waiting queue, the admission gate and swapping."""
