"""The command line: `tokencake`."""
