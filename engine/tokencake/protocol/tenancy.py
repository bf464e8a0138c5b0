"""Tenants: the prefix of their ids, the mark that proves it, and where the secret behind both comes from.

A tenant is the holder of one API key. The proxy derives the tenant's prefix from the key and a secret, puts it before
every id that the client sends and adds a mark that only the secret can make. The engine, which has the same secret,
counts what bears the mark and nothing else, so it does not matter by which way a hint arrives.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

TENANT_SEPARATOR: Final = "::"
"""What follows the tenant in an id."""

SECRET_VARIABLE: Final = "TOKENCAKE_TENANT_SECRET"  # noqa: S105  # names of variables
SECRET_FILE_VARIABLE: Final = "TOKENCAKE_TENANT_SECRET_FILE"  # noqa: S105
MIN_SECRET_CHARS: Final = 16

_TENANT_CHARS: Final = 16
_PROOF_CHARS: Final = 32


class SecretError(ValueError):
    """There is no usable secret; the words say where one is expected."""


class Tenants:
    """Everything that the secret makes. Times of one call: a few microseconds.

    Args:
        secret: what proxy and engine share, and no client knows.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def prefix(self, key: bytes) -> str:
        """The prefix of the ids of the tenant with this API key."""
        return self._digest("tenant", key, _TENANT_CHARS) + TENANT_SEPARATOR

    def mark(self, prefix: str) -> str:
        """The prefix with the proof that the proxy has written it."""
        return prefix + self._digest("mark", _bytes(prefix), _PROOF_CHARS)

    def prefix_from_mark(self, mark: object) -> str | None:
        """The prefix that `mark` proves; None where it proves none."""
        if not isinstance(mark, str) or len(mark) <= _PROOF_CHARS:
            return None
        prefix = mark[:-_PROOF_CHARS]
        return prefix if hmac.compare_digest(_bytes(self.mark(prefix)), _bytes(mark)) else None

    def salt(self, prefix: str, own: str = "") -> str:
        """The tenant's `cache_salt` in place of the client's `own`: 82 characters that vLLM takes.

        Requests share cached prefixes only where tenant and own salt are the same.
        """
        tenant = prefix.removesuffix(TENANT_SEPARATOR)
        salted = f"{tenant}.{self._digest('salt', _bytes(prefix + own), _PROOF_CHARS)}"
        return f"{salted}.{self._digest('salted', _bytes(salted), _PROOF_CHARS)}"

    def prefix_from_salt(self, salt: str | None) -> str | None:
        """The prefix of the tenant that `salt` was made for; None where the proxy has not made it."""
        salted, _, proof = (salt or "").rpartition(".")
        expected = self._digest("salted", _bytes(salted), _PROOF_CHARS)
        if not hmac.compare_digest(_bytes(expected), _bytes(proof)):
            return None
        return salted.partition(".")[0] + TENANT_SEPARATOR

    def scoped_name(self, prefix: str, name: str) -> str:
        """`name` with an ending that no other tenant's has, and that tells nothing of the prefix."""
        return f"{name}-{self._digest('name', _bytes(prefix + name), _TENANT_CHARS)}"

    def owns_name(self, prefix: str, name: str) -> bool:
        """Whether `scoped_name` has made this name for the tenant."""
        return hmac.compare_digest(_bytes(self.scoped_name(prefix, name.rpartition("-")[0])), _bytes(name))

    def _digest(self, purpose: str, text: bytes, chars: int) -> str:
        return hmac.digest(self._secret, purpose.encode() + b"\0" + text, "sha256").hex()[:chars]


def _bytes(text: str) -> bytes:
    """JSON can spell lone surrogates."""
    return text.encode(errors="surrogatepass")


def checked_secret(text: str, where: str) -> bytes:
    """The secret that stands in `text`.

    Raises:
        SecretError: it is too short to be one.
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
