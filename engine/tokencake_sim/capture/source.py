"""Input of a command: a file, or the URL of a running engine or proxy."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

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


def read_pages(source: str, path: str, items: str, limit: int, most: int, api_key: str | None = None) -> Any:
    """The JSON object in the file `source`, or the answer of the server at the URL `source`, all its pages as one.

    Args:
        source: a file, with one answer or a list of answers, the newest first; or a URL.
        path: what to GET there.
        items: the list in an answer that has pages, each the newest last.
        limit: items of a page.
        most: items from which on no more pages are asked for.
        api_key: for the server.

    Raises:
        SourceError: it cannot be read.
        ValueError: it is not JSON.
    """
    if not source.startswith(("http://", "https://")):
        answers = json.loads(read_text(source, path))
        return _joined(answers, items) if isinstance(answers, list) and answers else answers
    pages: list[Any] = []
    query = f"?limit={limit}"
    while True:
        page = json.loads(_fetch(source, path + query, api_key))
        pages.append(page)
        before = page.get("next") if isinstance(page, dict) else None
        if before is None or len(pages) * limit >= most:
            return _joined(pages, items)
        query = f"?limit={limit}&before={before}"


def _joined(pages: list[Any], items: str) -> Any:
    """The newest page with the items of all; anything that is no such page is returned as it is."""
    if not all(isinstance(page, dict) and isinstance(page.get(items), list) for page in pages):
        return pages[0]
    return {**pages[0], items: [item for page in reversed(pages) for item in page[items]]}


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
