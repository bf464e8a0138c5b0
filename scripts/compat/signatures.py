"""Signatures of functions in sources: the calls that a signature accepts, and whether another accepts them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Final

from scripts.compat.sources import Function

_KINDS: Final = ("property", "cached_property", "staticmethod", "classmethod")


@dataclass(frozen=True, slots=True)
class CallShape:
    """The arguments of a call: the number of positional ones, and the keywords. `is_open`: it has `*` or `**`."""

    positional: int
    keywords: tuple[str, ...] = ()
    is_open: bool = False


def kind_of(function: ast.AST) -> str:
    """`method`, `async method`, `property`, `staticmethod`, `classmethod` or `value`."""
    if not isinstance(function, Function):
        return "value"
    for decorator in function.decorator_list:
        name = ast.unparse(decorator).split("(")[0].split(".")[-1]
        if name in _KINDS:
            return name.removeprefix("cached_")
    return "async method" if isinstance(function, ast.AsyncFunctionDef) else "method"


def signature_of(function: Any, *, is_method: bool) -> inspect.Signature:
    """The parameters of `function`; for a method those after `self` or `cls`."""
    arguments: ast.arguments = function.args
    places = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(places) - len(arguments.defaults)) + arguments.defaults
    parameters = [
        _parameter(
            place,
            Parameter.POSITIONAL_ONLY if place in arguments.posonlyargs else Parameter.POSITIONAL_OR_KEYWORD,
            default,
        )
        for place, default in zip(places, defaults, strict=True)
    ]
    if is_method and parameters and kind_of(function) != "staticmethod":
        parameters = parameters[1:]
    if arguments.vararg:
        parameters.append(_parameter(arguments.vararg, Parameter.VAR_POSITIONAL, None))
    for place, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(_parameter(place, Parameter.KEYWORD_ONLY, default))
    if arguments.kwarg:
        parameters.append(_parameter(arguments.kwarg, Parameter.VAR_KEYWORD, None))
    return inspect.Signature(parameters)


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None) -> Parameter:
    return Parameter(argument.arg, kind, default=Parameter.empty if default is None else _Source(ast.unparse(default)))


class _Source(str):
    """A default value, as source text."""

    __slots__ = ()
    __repr__ = str.__str__


def calls_of(signature: inspect.Signature) -> Iterator[CallShape]:
    """Calls that `signature` accepts: with all and with only the required arguments, by position and by name."""
    places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    kinds = {p.kind for p in signature.parameters.values()}
    only = [p for p in places if p.kind is p.POSITIONAL_ONLY]
    for is_full in (True, False):
        given = [p for p in places if is_full or p.default is p.empty]
        names = tuple(p.name for p in named if is_full or p.default is p.empty)
        yield CallShape(len(given), names)
        yield CallShape(len(only), (*(p.name for p in given if p not in only), *names))
    every = tuple(p.name for p in named)
    if Parameter.VAR_POSITIONAL in kinds:
        yield CallShape(len(places) + 1, every)
    if Parameter.VAR_KEYWORD in kinds:
        yield CallShape(len(places), (*every, "something_else"))


def refusal(signature: inspect.Signature, call: CallShape) -> str | None:
    """Why `signature` does not accept `call`, or None."""
    bind = signature.bind_partial if call.is_open else signature.bind
    try:
        bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return str(error)
    return None
