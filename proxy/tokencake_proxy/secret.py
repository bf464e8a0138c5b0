"""The secret behind the tenants' prefixes and marks: given, read from a file, or made once and kept.

Proxies that serve one engine share it, and the engine has it too (`tokencake_vllm/tenant_secret.py`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from tokencake.protocol.tenancy import (
    SECRET_FILE_VARIABLE,
    SECRET_VARIABLE,
    SecretError,
    checked_secret,
    default_secret_file,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


def tenant_secret(environ: Mapping[str, str], file: Path | None = None) -> bytes:
    """The secret of `file`, of the variables in `environ`, or of the default file, which is made where it is missing.

    Raises:
        SecretError: what was given holds no secret, or the default file can be neither read nor made.
    """
    if file is None and (text := environ.get(SECRET_VARIABLE)):
        return checked_secret(text, f"`{SECRET_VARIABLE}`")
    if file is None and (name := environ.get(SECRET_FILE_VARIABLE)):
        file = Path(name)
    try:
        if file is None:
            file = Path(default_secret_file(environ, str(Path.home())))
            _make(file)
        return checked_secret(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SecretError(
            f"the tenants' secret cannot be had from {file}: {error}. Set `{SECRET_VARIABLE}` to a random text, or "
            f"`{SECRET_FILE_VARIABLE}` to a file that holds one"
        ) from None


def _make(file: Path) -> None:
    """Make `file` with a new secret, readable for its owner only, unless it is there; complete or not at all."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
        output.write(secrets.token_hex(32) + "\n")
    try:
        with contextlib.suppress(FileExistsError):  # another proxy was first: its secret counts
            os.link(part, file)
    finally:
        part.unlink()
