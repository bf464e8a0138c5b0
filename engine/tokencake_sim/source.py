"""Where does a command read from? A file, or the URL of a running engine or proxy."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from tokencake_sim.errors import SourceError

_TIMEOUT_S: Final = 30.0


def read_text(source: str, path: str, api_key: str | None = None) -> str:
    """What the file `source` holds, or what the server at the URL `source` answers to GET `path`.

    Raises:
        SourceError: it cannot be read.
    """
    if source.startswith(("http://", "https://")):
        return _fetch(source, path, api_key)
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{source} is not UTF-8: {error}") from None


def _fetch(source: str, path: str, api_key: str | None) -> str:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    url = f"{source.rstrip('/')}{path}"
    try:
        # The scheme was looked at by `read_text`.
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as answer:  # noqa: S310
            return str(answer.read().decode("utf-8"))
    except urllib.error.HTTPError as error:
        error.close()
        way_out = "; give --api-key" if error.code in (401, 403) else ""
        raise SourceError(f"{url} answers {error.code} {error.reason}{way_out}") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{url} cannot be read: {error}") from None
