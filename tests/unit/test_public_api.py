"""The public names of the packages. A change here is a change that users see."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

PUBLIC = {
    "tokencake_cli": [
        "STOCK_ENV",
        "Processes",
        "StartError",
        "default_log_dir",
        "engine_command",
        "free_port",
        "proxy_command",
        "raise_on_sigterm",
        "stock_command",
    ],
    "tokencake_langgraph": ["ChatTokencake", "SenderStats", "TokencakeHandler", "flush", "stats", "tool_span"],
    "tokencake_proxy": ["Proxy", "ProxySettings", "SettingsError", "create_app", "run"],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_exports_exactly_its_public_names(package: str) -> None:
    module = import_module(package)

    assert module.__all__ == PUBLIC[package]
    assert all(getattr(module, name) is not None for name in PUBLIC[package])


def test_importing_the_proxys_package_does_not_import_its_server() -> None:
    # A worker process for large bodies starts with this import.
    command = "import sys, tokencake_proxy; sys.exit('uvicorn' in sys.modules or 'aiohttp' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_an_unknown_name_of_the_proxy_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = import_module("tokencake_proxy").nothing
