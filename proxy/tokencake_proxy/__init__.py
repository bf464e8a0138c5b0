"""The OpenAI-compatible proxy and the `tokencake` command line."""
