"""Live calls, sessions and applications, as hints and events describe them."""
