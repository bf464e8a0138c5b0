"""The OpenAI-compatible proxy between clients and vLLM.

The public names are imported on first use, because a worker process (`workers`) needs only a part of the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencake.settings import SettingsError
    from tokencake_proxy.app import Proxy, create_app
    from tokencake_proxy.server import run
    from tokencake_proxy.settings import ProxySettings

__all__ = ["Proxy", "ProxySettings", "SettingsError", "create_app", "run"]

_MODULES = {
    "Proxy": "tokencake_proxy.app",
    "ProxySettings": "tokencake_proxy.settings",
    "SettingsError": "tokencake.settings",
    "create_app": "tokencake_proxy.app",
    "run": "tokencake_proxy.server",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tokencake_proxy needs {error.name}; install it with: pip install 'tokencake[proxy]'", name=error.name
        ) from error
