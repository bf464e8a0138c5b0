"""The secret by which an engine knows what its proxy has marked, as the proxy has it (`tokencake_proxy/secret.py`).

Read when it is first needed, because the engine may start before the proxy that makes it. Until it is there, and for
what bears no mark made with it, no hint and no event counts.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm.logger import init_logger

from tokencake.protocol.tenancy import (
    SECRET_FILE_VARIABLE,
    SECRET_VARIABLE,
    SecretError,
    Tenants,
    checked_secret,
    default_secret_file,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = init_logger("vllm.tokencake")

_LOOK_AGAIN_S: Final = 1.0


class TenantSecret:
    """The tenants that this engine serves.

    Args:
        environ: where the secret, or the name of its file, is looked for.

    Raises:
        SecretError: the environment holds something that is no secret.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._file = Path(environ.get(SECRET_FILE_VARIABLE) or default_secret_file(environ, str(Path.home())))
        self._looked_s: float | None = None
        self._is_found = False
        # A random one: until the true one is there, no mark is valid.
        self._tenants = Tenants(secrets.token_bytes(32))
        if text := environ.get(SECRET_VARIABLE):
            self._tenants, self._is_found = Tenants(checked_secret(text, f"`{SECRET_VARIABLE}`")), True

    def tenants(self) -> Tenants:
        """By which marks are judged now. Looks for a missing secret once a second at most."""
        now = time.monotonic()
        if not self._is_found and (self._looked_s is None or now - self._looked_s >= _LOOK_AGAIN_S):
            is_first = self._looked_s is None
            self._looked_s = now
            try:
                secret = checked_secret(self._file.read_text(encoding="utf-8"), str(self._file))
            except (OSError, UnicodeDecodeError, SecretError) as error:
                if is_first:
                    logger.warning(
                        "TokenCake: tenants are kept apart, and their secret is not there yet (%s): no hint counts "
                        "until it is. Set %s or %s to what the proxy has",
                        error,
                        SECRET_VARIABLE,
                        SECRET_FILE_VARIABLE,
                    )
            else:
                self._tenants, self._is_found = Tenants(secret), True
                logger.info("TokenCake: tenants are kept apart by the secret in %s", self._file)
        return self._tenants
