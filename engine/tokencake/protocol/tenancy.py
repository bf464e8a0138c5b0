"""Tenant isolation: the prefix of a tenant's ids, the mark that proves it, and the secret from which both are derived.

A tenant is the holder of one API key. The proxy derives the tenant's prefix from the key and a secret, puts it before
every id that the client sends, and adds a mark that requires the secret. The engine has the same secret and ignores
everything without a valid mark, so the route by which a hint arrives does not matter.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

TENANT_SEPARATOR: Final = "::"
"""Separates the tenant from the client's own id."""

SECRET_VARIABLE: Final = "TOKENCAKE_TENANT_SECRET"  # noqa: S105  # the name of a variable
SECRET_FILE_VARIABLE: Final = "TOKENCAKE_TENANT_SECRET_FILE"  # noqa: S105
MIN_SECRET_CHARS: Final = 16

_TENANT_CHARS: Final = 16
_PROOF_CHARS: Final = 32


class SecretError(ValueError):
    """There is no valid secret; the message says where one is expected."""


class Tenants:
    """Derives and verifies prefixes, marks, salts and names. Each method takes a few microseconds.

    Args:
        secret: shared by proxy and engine, unknown to clients.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def prefix(self, key: bytes) -> str:
        """The prefix of the ids of the tenant with this API key."""
        return self._digest("tenant", key, _TENANT_CHARS) + TENANT_SEPARATOR

    def mark(self, prefix: str) -> str:
        """`prefix` followed by the proof that the proxy wrote it."""
        return prefix + self._digest("mark", _bytes(prefix), _PROOF_CHARS)

    def prefix_from_mark(self, mark: object) -> str | None:
        """The prefix that `mark` proves; None if the mark is not valid."""
        if not isinstance(mark, str) or len(mark) <= _PROOF_CHARS:
            return None
        prefix = mark[:-_PROOF_CHARS]
        return prefix if hmac.compare_digest(_bytes(self.mark(prefix)), _bytes(mark)) else None

    def salt(self, prefix: str, own: str = "") -> str:
        """The tenant's `cache_salt`, derived from the client's `own` salt: 82 characters that vLLM accepts.

        Requests share cached prefixes only if tenant and own salt are the same.
        """
        tenant = prefix.removesuffix(TENANT_SEPARATOR)
        salted = f"{tenant}.{self._digest('salt', _bytes(prefix + own), _PROOF_CHARS)}"
        return f"{salted}.{self._digest('salted', _bytes(salted), _PROOF_CHARS)}"

    def prefix_from_salt(self, salt: str | None) -> str | None:
        """The prefix of the tenant whose `salt` this is; None if the proxy did not derive it."""
        salted, _, proof = (salt or "").rpartition(".")
        expected = self._digest("salted", _bytes(salted), _PROOF_CHARS)
        if not hmac.compare_digest(_bytes(expected), _bytes(proof)):
            return None
        return salted.partition(".")[0] + TENANT_SEPARATOR

    def scoped_name(self, prefix: str, name: str) -> str:
        """`name` with a suffix that is unique to the tenant and does not reveal its prefix."""
        return f"{name}-{self._digest('name', _bytes(prefix + name), _TENANT_CHARS)}"

    def owns_name(self, prefix: str, name: str) -> bool:
        """Whether `name` is a result of `scoped_name` for this tenant."""
        return hmac.compare_digest(_bytes(self.scoped_name(prefix, name.rpartition("-")[0])), _bytes(name))

    def _digest(self, purpose: str, text: bytes, chars: int) -> str:
        return hmac.digest(self._secret, purpose.encode() + b"\0" + text, "sha256").hex()[:chars]


def _bytes(text: str) -> bytes:
    """`text` as bytes. JSON can express lone surrogates."""
    return text.encode(errors="surrogatepass")


def checked_secret(text: str, where: str) -> bytes:
    """The secret in `text`; `where` names its source in the error.

    Raises:
        SecretError: it is too short.
    """
    secret = text.strip()
    if len(secret) < MIN_SECRET_CHARS:
        raise SecretError(
            f"{where} holds {len(secret)} characters; expected a secret of at least {MIN_SECRET_CHARS}, for example "
            "the output of `openssl rand -hex 32`"
        )
    return secret.encode()


def default_secret_file(environ: Mapping[str, str], home: str) -> str:
    """`tokencake/tenant-secret` in the state directory of the user whose home directory is `home`."""
    return f"{environ.get('XDG_STATE_HOME') or f'{home}/.local/state'}/tokencake/tenant-secret"
