"""The proxy as a server process: uvicorn, listening sockets, and the limit of open files."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import uvicorn

from tokencake_proxy.app import create_app
from tokencake_proxy.connection import connection_class

if TYPE_CHECKING:
    from tokencake_proxy.settings import ProxySettings

logger: Final = logging.getLogger(__name__)

_BACKLOG: Final = 2048
_FILES_PER_CONNECTION: Final = 2
"""One to the client, one to the engine."""
_OTHER_FILES: Final = 64


def run(settings: ProxySettings, host: str, port: int, log_level: str) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        settings: the upstream and the limits.
        host: name or address to listen on.
        port: 0 selects a free port, which the log names.
        log_level: a level of `logging`, for example "info".

    Raises:
        SystemExit: it cannot listen on the address; the message says why. Exit code 1.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = _within_open_files(settings)
    listeners = _listen(host, port)
    for listener in listeners:
        address, bound_port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        logger.info("forwarding http://%s:%d to %s", shown, bound_port, settings.upstream)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean shutdown
        uvicorn.Server(server_config(settings)).run(sockets=listeners)


def server_config(settings: ProxySettings) -> uvicorn.Config:
    """The configuration of uvicorn."""
    app = create_app(settings)
    return uvicorn.Config(
        app,
        http=connection_class(settings, app.refusal_log),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,  # the engine's own `server` and `date` are forwarded
        date_header=False,
        timeout_keep_alive=settings.idle_client_s,  # type: ignore[arg-type]  # seconds for `call_later`
        timeout_graceful_shutdown=settings.shutdown_grace_s,
        backlog=_BACKLOG,
    )


def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address that `host` resolves to."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                listeners.append(socket.create_server(address[:2], family=family, backlog=_BACKLOG))
            except OSError as error:
                # `localhost` resolves to an IPv6 address even on a machine without IPv6.
                if family != socket.AF_INET6 or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise SystemExit(_cannot_listen(host, port, error)) from None
    if not listeners:
        raise SystemExit(f"The proxy cannot listen on {host}: this machine has no such address. Give another --host.")
    return listeners


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"Port {port} on {host} is in use. Stop the server there, or choose another port with --port."
        case errno.EACCES:
            return f"This user may not listen on port {port} of {host}. Choose a port above 1023 with --port."
        case _:
            return f"The proxy cannot listen on {host} port {port}: {error}. Give another --host or --port."


def _within_open_files(settings: ProxySettings) -> ProxySettings:
    """Raise the limit of open files to what `max_connections` needs; if that fails, lower `max_connections`."""
    if sys.platform == "win32":
        return settings
    import resource  # noqa: PLC0415 - not available on Windows

    wanted = settings.max_connections * _FILES_PER_CONNECTION + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    possible = (allowed - _OTHER_FILES) // _FILES_PER_CONNECTION
    if possible >= settings.max_connections:
        return settings
    logger.warning(
        "max_connections is %d, but this process may open only %d files: serving %d connections. Raise `ulimit -n`",
        settings.max_connections,
        allowed,
        possible,
    )
    return replace(settings, max_connections=possible)
