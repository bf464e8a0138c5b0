"""The modelled device: clock, step cost, host link and the worker side of connectors."""
