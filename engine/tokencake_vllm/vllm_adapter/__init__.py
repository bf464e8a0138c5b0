"""What is read of vLLM's private state: the block pool and the requests."""
