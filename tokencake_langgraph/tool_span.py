"""`tool_span`: reports that an agent waits for plain code in a node.

```python
with tool_span("crawl", estimate_s=20.0):  # or `async with`, or as a decorator of a function or coroutine function
    pages = crawl(urls)
```
The session of the node's own LLM calls is reported as stalled meanwhile. Outside a graph, and inside a tool (whose
stall is reported anyway), it does nothing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from tokencake_langgraph.enclosing import enclosing_run
from tokencake_langgraph.estimates import is_duration
from tokencake_langgraph.lifecycle import LIFECYCLE
from tokencake_langgraph.run_tree import ReportedStall

logger = logging.getLogger(__name__)
_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class tool_span:  # noqa: N801 - used like a function
    """A section of plain code named `name`, expected to take `estimate_s` seconds."""

    def __init__(self, name: str, estimate_s: float | None = None) -> None:
        if estimate_s is not None and not is_duration(estimate_s):
            raise ValueError(f"estimate_s of tool_span({name!r}) is {estimate_s!r}; expected seconds, for example 4.0.")
        self._name = name
        self._estimate_s = estimate_s
        self._stall: ReportedStall | None = None

    def __enter__(self) -> None:
        try:
            run_id, metadata = enclosing_run()
            self._stall = LIFECYCLE.start_stall(run_id, metadata, self._name, self._estimate_s)
        except Exception:
            logger.exception("TokenCake could not report tool_span(%r).", self._name)

    def __exit__(self, *error: object) -> None:
        stall, self._stall = self._stall, None
        if stall is not None:
            LIFECYCLE.end_stall(stall)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        self.__exit__(*error)

    def __call__(self, function: Callable[_P, _Result]) -> Callable[_P, _Result]:
        """Decorate `function`: each of its calls is a span."""
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def awaited(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                with tool_span(self._name, self._estimate_s):
                    return await function(*args, **kwargs)

            return cast("Callable[_P, _Result]", awaited)

        @wraps(function)
        def called(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
            with tool_span(self._name, self._estimate_s):
                return function(*args, **kwargs)

        return called
