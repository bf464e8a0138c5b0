"""Start of stock vLLM with the plug-in: `python -m tokencake_vllm.serve MODEL [vLLM's own flags]`.

This is `vllm serve`, reached without vLLM's console script, which the CPU distribution breaks (it asks for the metadata
of a distribution called `vllm`).
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from tokencake.front_end import front_end_problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PLUGINS: Final = ("tokencake", "tokencake_http")
"""Names of the entry points: `vllm.general_plugins`, `vllm.endpoint_plugins`."""

SCHEDULER: Final = "tokencake_vllm.scheduler.create_scheduler"
"""For vLLM's `--scheduler-cls`."""

_GROUPS: Final = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def plugin_allowlist(environ: Mapping[str, str]) -> str:
    """`VLLM_PLUGINS` with our plug-ins in it.

    Where the user set none, the other installed plug-ins are named too: the variable filters every group, and vLLM
    would have loaded them without it. Endpoint plug-ins stay opt-in, as vLLM wants it.
    """
    chosen = environ.get("VLLM_PLUGINS")
    names = (
        [name for name in chosen.split(",") if name]
        if chosen is not None
        else [plugin.name for group in _GROUPS for plugin in entry_points(group=group)]
    )
    return ",".join(dict.fromkeys([*names, *PLUGINS]))


def connector_config() -> dict[str, Any]:
    """For vLLM's `--kv-transfer-config`: what the Time Scheduler moves blocks with."""
    return {
        "kv_connector": "TokenCakeConnector",
        "kv_connector_module_path": "tokencake_vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }


def connector_flags(argv: Sequence[str]) -> list[str]:
    """Our connector, unless the user brings one or has switched the Time Scheduler off."""
    if any(arg.split("=")[0].split(".")[0].replace("_", "-") == "--kv-transfer-config" for arg in argv):
        return []
    try:
        is_on = json.loads(_value_of("--additional-config", argv) or "{}")["tokencake"]["time"].get("enabled", True)
    except (ValueError, KeyError, TypeError, AttributeError):  # what is malformed, the engine names
        is_on = True
    return ["--kv-transfer-config", json.dumps(connector_config())] if is_on else []


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for place, arg in enumerate(argv):
        if arg == flag and place + 1 < len(argv):
            return argv[place + 1]
        if arg.startswith(f"{flag}="):
            return arg.removeprefix(f"{flag}=")
    return None


def main(argv: Sequence[str]) -> int:
    """Run `vllm serve` with the plug-in and TokenCake's scheduler; returns the exit status."""
    if any(arg == "--scheduler-cls" or arg.startswith("--scheduler-cls=") for arg in argv):
        print(
            f"--scheduler-cls is taken by TokenCake's own, {SCHEDULER}; for another scheduler start vLLM itself",
            file=sys.stderr,
        )
        return 2
    if (problem := front_end_problem(os.environ)) is not None:
        print(problem, file=sys.stderr)
        return 2
    os.environ["VLLM_PLUGINS"] = plugin_allowlist(os.environ)
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does

    import vllm  # noqa: PLC0415  # after the environment is set, which vLLM caches

    from tokencake_vllm.plugin import version_problem  # noqa: PLC0415

    if (problem := version_problem(vllm.__version_tuple__)) is not None:
        print(problem, file=sys.stderr)
        return 1

    from vllm.entrypoints.cli.serve import ServeSubcommand  # noqa: PLC0415
    from vllm.logger import configure_logging_from_args  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = FlexibleArgumentParser(prog="tokencake")  # type: ignore[no-untyped-call]  # vLLM's
    commands = parser.add_subparsers(dest="subparser", required=True)
    serve = ServeSubcommand()
    serve.subparser_init(commands)
    connector = connector_flags(argv)
    args = parser.parse_args(["serve", *argv, *connector, "--scheduler-cls", SCHEDULER])
    if args.grpc:
        print(
            "--grpc: that front end speaks no HTTP, by which TokenCake's events come; leave the flag out",
            file=sys.stderr,
        )
        return 2
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
