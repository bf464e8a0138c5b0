"""The names that sources use of a package: imports, attributes, calls and classes, with the place of each."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.compat.signatures import CallShape
from scripts.compat.sources import Definition, Function, Module, bound_names, package_of

_IGNORED: Final = "type: ignore[attr-defined]"


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of TokenCake's sources."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Import:
    """`from module import name`, or `import module` where `name` is None."""

    place: SourceLine
    module: str
    name: str | None
    alternatives: int | None = None
    """Id of the `try` with an `except ImportError` around it: one import of such a group suffices."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """`.name` of `(module, owner)`: a module, a class, or an object of that class."""

    place: SourceLine
    module: str
    owner: str | None
    name: str


@dataclass(frozen=True, slots=True)
class NamedCall:
    """A call of an imported name, or of `super().name` in TokenCake's class `owner`."""

    place: SourceLine
    module: str
    name: str
    call: CallShape
    owner: str | None = None


@dataclass(slots=True)
class Uses:
    """All uses in a set of files."""

    imports: list[Import] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    calls: list[NamedCall] = field(default_factory=list)
    classes: list[Definition] = field(default_factory=list)
    selves: list[Attribute] = field(default_factory=list)
    """Attributes of `self` in TokenCake's classes."""
    others: dict[str, SourceLine] = field(default_factory=dict)
    """Attribute of objects of unknown type -> its first place."""


@dataclass(slots=True)
class _Scope:
    """A module, class or function. `names`: name -> definition in the package, or None for a local name."""

    names: dict[str, tuple[str, str | None] | None] = field(default_factory=dict)
    types: dict[str, tuple[str, str | None]] = field(default_factory=dict)


def uses_of(modules: Iterable[tuple[Module, str]], package: str) -> Uses:
    """The uses of `package` in the modules, each given with its file name."""
    uses = Uses()
    for module, file in modules:
        _Reader(module, file, package, uses).read()
    return uses


class _Reader(ast.NodeVisitor):
    """Reads one file, with the names in scope."""

    def __init__(self, module: Module, file: str, package: str, uses: Uses) -> None:
        self._module, self._file, self._package, self._uses = module, file, package, uses
        self._scopes: list[_Scope] = []
        self._class: Definition | None = None
        self._tries: list[int | None] = []

    def read(self) -> None:
        self._enter(self._module.tree.body)
        for statement in self._module.tree.body:
            self.visit(statement)

    def _place(self, node: Any) -> SourceLine:
        return SourceLine(self._file, node.lineno)

    # --- scopes -----------------------------------------------------------------------------------------

    def _enter(self, body: list[ast.stmt], arguments: ast.arguments | None = None) -> None:
        scope = _Scope()
        for node in _own_statements(body):
            self._bind(scope, node)
        self._scopes.append(scope)
        narrowed = set(_narrowed(body))
        for argument in ast.walk(arguments) if arguments is not None else ():
            if isinstance(argument, ast.arg):
                scope.names[argument.arg] = None
                known = self._known(_without_none(argument.annotation))
                if known is not None and argument.arg not in narrowed:
                    scope.types[argument.arg] = known

    def _bind(self, scope: _Scope, node: ast.AST) -> None:
        match node:
            case ast.ImportFrom(names=aliases):
                module = self._module.absolute(node)
                for alias in aliases:
                    is_theirs = package_of(module) == self._package
                    scope.names[alias.asname or alias.name] = (module, alias.name) if is_theirs else None
            case ast.Import(names=aliases):
                for alias in aliases:
                    target = alias.name if alias.asname else package_of(alias.name)
                    is_theirs = package_of(alias.name) == self._package
                    scope.names[alias.asname or target] = (target, None) if is_theirs else None
            case ast.Name(id=name, ctx=ast.Store()):
                scope.names.setdefault(name, None)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                scope.names.setdefault(bound_names(node)[0], None)

    def _known(self, node: ast.AST | None) -> tuple[str, str | None] | None:
        """The definition in the package of a name or dotted name."""
        match node:
            case ast.Constant(value=str(text)):
                try:
                    return self._known(_without_none(ast.parse(text, mode="eval").body))
                except SyntaxError:
                    return None
            case ast.Name(id=name):
                return next((scope.names[name] for scope in reversed(self._scopes) if name in scope.names), None)
            case ast.Attribute(value=value, attr=name):
                owner = self._known(value)
                return (owner[0], name) if owner is not None and owner[1] is None else None
        return None

    def _type(self, node: ast.AST) -> tuple[str, str | None] | None:
        """The class of the package that a parameter is annotated with."""
        if not isinstance(node, ast.Name):
            return None
        scope = next((scope for scope in reversed(self._scopes) if node.id in scope.names), None)
        return None if scope is None else scope.types.get(node.id)

    # --- what is used -----------------------------------------------------------------------------------

    def visit_Try(self, node: ast.Try) -> None:
        is_choice = any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type is not None)
        self._tries.append(id(node) if is_choice else None)
        self.generic_visit(node)
        self._tries.pop()

    def _note_import(self, node: ast.AST, module: str, name: str | None) -> None:
        if package_of(module) == self._package:
            choice = next((one for one in self._tries if one is not None), None)
            self._uses.imports.append(Import(self._place(node), module, name, choice))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._note_import(node, alias.name, None)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._note_import(node, self._module.absolute(node), alias.name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for inner in (*node.bases, *node.decorator_list):
            self.visit(inner)
        outer, self._class = self._class, Definition("class", self._module.name, node.name, node)
        self._uses.classes.append(self._class)
        for statement in node.body:
            self.visit(statement)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for inner in (*node.decorator_list, node.args, *([node.returns] if node.returns else [])):
            self.visit(inner)
        self._enter(node.body, node.args)
        for statement in node.body:
            self.visit(statement)
        self._scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  # the name that NodeVisitor looks for

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._enter([], node.args)
        self.visit(node.body)
        self._scopes.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        place = self._place(node)
        named, typed = self._known(node.value), self._type(node.value)
        if _IGNORED in self._module.lines[node.lineno - 1]:
            pass  # mypy was told that the attribute is missing
        elif named is not None:
            if named[1] is None or not isinstance(node.ctx, ast.Store):  # else the line adds the attribute
                self._uses.attributes.append(Attribute(place, *named, node.attr))
        elif typed is not None:
            self._uses.attributes.append(Attribute(place, *typed, node.attr))
        elif isinstance(node.value, ast.Name) and node.value.id == "self" and self._class is not None:
            if isinstance(node.ctx, ast.Load):
                self._uses.selves.append(Attribute(place, self._class.module, self._class.name, node.attr))
        else:
            self._uses.others.setdefault(node.attr, place)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        is_open = any(isinstance(one, ast.Starred) for one in node.args) or any(k.arg is None for k in node.keywords)
        positional = sum(not isinstance(one, ast.Starred) for one in node.args)
        call = CallShape(positional, tuple(k.arg for k in node.keywords if k.arg is not None), is_open=is_open)
        match node.func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name) if (
                self._class is not None
            ):
                cls = self._class
                self._uses.calls.append(NamedCall(self._place(node), cls.module, name, call, cls.name))
            case _ if (known := self._known(node.func)) is not None and known[1] is not None:
                self._uses.calls.append(NamedCall(self._place(node), known[0], known[1], call))
        self.generic_visit(node)


def _narrowed(body: list[ast.stmt]) -> Iterator[str]:
    """Names that `body` narrows with `isinstance`: their annotation is not their whole type."""
    for statement in body:
        for node in ast.walk(statement):
            match node:
                case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id=name), _]):
                    yield name


def _without_none(annotation: ast.AST | None) -> ast.AST | None:
    """`X` of `X | None`."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        sides = [s for s in (annotation.left, annotation.right) if ast.unparse(s) != "None"]
        return sides[0] if len(sides) == 1 else None
    return annotation


def _own_statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes of this scope, without those of functions and classes inside it."""
    for node in body:
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            yield from _own_statements(list(ast.iter_child_nodes(node)))  # type: ignore[arg-type]  # any node
