from collections.abc import Callable

import pytest

from tokencake.protocol import Hint
from tokencake.space_scheduler.applications import AppTracker, LiveRequest


@pytest.fixture
def applications() -> AppTracker:
    return AppTracker({}.get, answer_quantile=0.8)


@pytest.fixture
def call(applications: AppTracker) -> Callable[..., LiveRequest]:
    """`call("app", now=3.0, depth=2)` is a call of that application; `call(None)` has no hint.

    The tenant of "a::app" is "a".
    """

    def add(
        app: str | None, *, now: float = 0.0, max_tokens: int = 100, prompt_tokens: int = 100, **fields
    ) -> LiveRequest:
        number = len(applications.calls)
        hint = None if app is None else Hint(session=f"{app}-s", app=app, **fields)
        tenant, found, _ = (app or "").partition("::")
        return applications.add(
            f"r{number}-{now}",
            hint,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            now=now,
            tenant=tenant if found else "",
        )

    return add
