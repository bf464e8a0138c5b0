"""The `tokencake` command (`main`), and the functions with which it starts an engine and a proxy."""

from tokencake_cli.processes import (
    STOCK_ENV,
    Processes,
    StartError,
    default_log_dir,
    engine_command,
    free_port,
    proxy_command,
    raise_on_sigterm,
    stock_command,
)

__all__ = [
    "STOCK_ENV",
    "Processes",
    "StartError",
    "default_log_dir",
    "engine_command",
    "free_port",
    "proxy_command",
    "raise_on_sigterm",
    "stock_command",
]
