"""The baseline `stock+host`: an LRU host cache behind vLLM's connector interface."""
