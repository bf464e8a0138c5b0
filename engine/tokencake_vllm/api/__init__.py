"""HTTP routes and metrics that the API server of vLLM serves for the scheduler."""
