"""The tenant secret, from which prefixes and marks are derived: given, read from a file, or generated once and stored.

All proxies before one engine share it, and so does the engine (`tokencake_vllm/tenant_secret.py`).
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
    """The secret in `file`, in the variables of `environ`, or in the default file, which is created if it is missing.

    Raises:
        SecretError: the given source holds no valid secret, or the default file can be neither read nor created.
    """
    if file is None and (text := environ.get(SECRET_VARIABLE)):
        return checked_secret(text, f"`{SECRET_VARIABLE}`")
    if file is None and (name := environ.get(SECRET_FILE_VARIABLE)):
        file = Path(name)
    try:
        if file is None:
            file = Path(default_secret_file(environ, str(Path.home())))
            _create(file)
        return checked_secret(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SecretError(
            f"the tenant secret cannot be read from {file}: {error}. Set `{SECRET_VARIABLE}` to a random text, or "
            f"`{SECRET_FILE_VARIABLE}` to a file that contains one"
        ) from None


def _create(file: Path) -> None:
    """Create `file` with a new secret, readable for its owner only, unless it exists. The file is never incomplete."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
        output.write(secrets.token_hex(32) + "\n")
    try:
        with contextlib.suppress(FileExistsError):  # another proxy was first: its secret is used
            os.link(part, file)
    finally:
        part.unlink()
