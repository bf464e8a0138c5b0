"""Modules, names, classes and their members, read from Python files without importing them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

Function: Final = ast.FunctionDef | ast.AsyncFunctionDef
DefinitionKind: TypeAlias = Literal["class", "function", "value", "module", "unknown"]

_CLOSED_BASES: Final = {"object", "ABC", "Protocol", "Generic", "NamedTuple", "Enum", "IntEnum", "StrEnum", "Exception"}
"""Base classes outside the sources that add no public attributes, except `name` and `value` of an enumeration."""
_ENUMS: Final = {"Enum", "IntEnum", "StrEnum"}


@dataclass(frozen=True, slots=True)
class Definition:
    """The definition of a name; `unknown` if it is outside the sources, or created at run time."""

    kind: DefinitionKind
    module: str
    name: str
    node: ast.AST | None = None

    @property
    def path(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module


class Module:
    """One file, with the definitions of its names."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file
        text = file.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        self.tree = ast.parse(text, str(file))
        self.names: dict[str, ast.AST] = {}
        self.stars: list[str] = []
        for statement in top_level(self.tree.body):
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                self.stars.append(self.absolute(statement))
            for bound in bound_names(statement):
                is_overload = isinstance(self.names.get(bound), Function) and isinstance(statement, Function)
                if bound not in self.names or is_overload:  # the last of overloads, else the first
                    self.names[bound] = statement

    def absolute(self, statement: ast.ImportFrom) -> str:
        """The module that `statement` imports from."""
        if not statement.level:
            return statement.module or ""
        is_package = self.file.name == "__init__.py"
        parents = self.name.split(".")
        kept = parents[: len(parents) - statement.level + is_package]
        return ".".join([*kept, *([statement.module] if statement.module else [])])


def package_of(module: str) -> str:
    """The top-level package of a dotted name."""
    return module.partition(".")[0]


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, including those in `if`, `try` and `with`, in order."""
    for statement in body:
        yield statement
        match statement:
            case ast.If() | ast.For() | ast.While():
                yield from top_level([*statement.body, *statement.orelse])
            case ast.Try():
                handlers = [inner for handler in statement.handlers for inner in handler.body]
                yield from top_level([*statement.body, *statement.orelse, *statement.finalbody, *handlers])
            case ast.With():
                yield from top_level(statement.body)


def bound_names(statement: ast.AST) -> list[str]:
    """Names that a statement binds in its own scope."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [name for target in targets for name in stored_names(target)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Import(names=aliases):
            return [alias.asname or alias.name.partition(".")[0] for alias in aliases]
        case ast.ImportFrom(names=aliases):
            return [alias.asname or alias.name for alias in aliases if alias.name != "*"]
    return []


def stored_names(target: ast.AST) -> list[str]:
    """Names that an assignment to `target` binds."""
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


class Sources:
    """Files in source folders. `roots`: top-level package -> folder that contains it."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = dict(roots)
        self._modules: dict[str, Module | None] = {}
        self._orders: dict[str, list[Definition]] = {}

    def module(self, name: str) -> Module | None:
        """The module of this name, or None if the sources lack it."""
        if name not in self._modules:
            root = self.roots.get(package_of(name))
            place = None if root is None else root.joinpath(*name.split("."))
            files = [] if place is None else [place.with_suffix(".py"), place / "__init__.py"]
            file = next((file for file in files if file.is_file()), None)
            self._modules[name] = None if file is None else Module(name, file)
        return self._modules[name]

    def resolve(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition | None:
        """The definition that `from module import name` finds, through re-exports; None if the import would fail."""
        found = self.module(module)
        if (module, name) in seen:
            return None
        seen |= {(module, name)}
        if found is None:
            is_known = package_of(module) in self.roots
            return None if is_known else Definition("unknown", module, name)
        if (node := found.names.get(name)) is not None:
            return self._defined(found, name, node, seen)
        for other in found.stars:
            if (star := self.resolve(other, name, seen)) is not None:
                return star
        if self.module(f"{module}.{name}") is not None or self._is_folder(f"{module}.{name}"):
            return Definition("module", f"{module}.{name}", "")
        return Definition("unknown", module, name) if "__getattr__" in found.names else None

    def _is_folder(self, name: str) -> bool:
        root = self.roots.get(package_of(name))
        return root is not None and root.joinpath(*name.split(".")).is_dir()

    def _defined(self, found: Module, name: str, node: ast.AST, seen: frozenset[tuple[str, str]]) -> Definition | None:
        match node:
            case ast.ClassDef():
                return Definition("class", found.name, name, node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return Definition("function", found.name, name, node)
            case ast.Import(names=aliases):
                alias = next(a for a in aliases if name in (a.asname, a.name.split(".")[0]))
                return Definition("module", alias.name if alias.asname else name, "")
            case ast.ImportFrom(names=aliases):
                original = next(a.name for a in aliases if name in (a.asname, a.name))
                return self.resolve(found.absolute(node), original, seen)
            case ast.Assign(value=ast.Name(id=other)) if other != name:
                return self.resolve(found.name, other, seen) or Definition("value", found.name, name, node)
        return Definition("value", found.name, name, node)

    def expression(self, module: str, node: ast.AST | None) -> Definition | None:
        """The definition of a name or dotted name in `module`; None for other expressions."""
        match node:
            case ast.Name(id=name):
                return self.resolve(module, name)
            case ast.Attribute(value=value, attr=name):
                owner = self.expression(module, value)
                return self.resolve(owner.module, name) if owner is not None and owner.kind == "module" else None
            case ast.Subscript(value=value):
                return self.expression(module, value)
        return None

    # --- classes --------------------------------------------------------------------------------------

    def order(self, cls: Definition) -> list[Definition]:
        """The method resolution order; bases outside the sources are `unknown`."""
        if cls.path not in self._orders:
            self._orders[cls.path] = [cls]  # for a class that inherits from itself
            bases: list[Definition] = []
            for base in cls.node.bases if isinstance(cls.node, ast.ClassDef) else []:
                found = self.expression(cls.module, base)
                unknown = Definition("unknown", "", ast.unparse(base).split("[")[0].split(".")[-1])
                bases.append(found if found is not None and found.kind == "class" else unknown)
            self._orders[cls.path] = [cls, *_merged([*(self.order(base) for base in bases), bases])]
        return self._orders[cls.path]

    def member(self, cls: Definition, name: str) -> tuple[Definition, ast.AST] | None:
        """The class that defines `name`, and the method or assignment that defines it."""
        for owner in self.order(cls):
            if (node := members(owner).get(name)) is not None:
                return owner, node
        return None

    def may_have(self, cls: Definition, name: str) -> bool:
        """Whether objects of `cls` may have `name`, as far as the sources show."""
        if self.member(cls, name) is not None or self.member(cls, "__getattr__") is not None:
            return True
        outside = {base.name for base in self.order(cls) if base.kind == "unknown"}
        return hasattr(object, name) or not outside <= _CLOSED_BASES or (bool(outside & _ENUMS) and name in _OF_ENUMS)

    def homes(self, package: str, name: str) -> list[str]:
        """Modules of `package` that define `name` at their top level."""
        pattern = re.compile(rf"^(?:(?:async )?def|class) {re.escape(name)}\b|^{re.escape(name)}\s*[:=]", re.MULTILINE)
        root = self.roots[package]
        found = [f for f in sorted((root / package).rglob("*.py")) if pattern.search(f.read_text(encoding="utf-8"))]
        return [".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for f in found]


_OF_ENUMS: Final = {"name", "value"}


def members(cls: Definition) -> dict[str, ast.AST]:
    """Names defined by the class itself: methods, class attributes, and attributes that its methods store in `self`."""
    if not isinstance(cls.node, ast.ClassDef):
        return {}
    if (found := _MEMBERS.get(cls.node)) is None:
        found = _MEMBERS[cls.node] = _members(cls.node)
    return found


_MEMBERS: Final[dict[ast.ClassDef, dict[str, ast.AST]]] = {}


def _members(cls: ast.ClassDef) -> dict[str, ast.AST]:
    found: dict[str, ast.AST] = {}
    stored: dict[str, ast.AST] = {}
    for statement in top_level(cls.body):
        if isinstance(statement, Function):
            if any(ast.unparse(d).endswith((".setter", ".deleter")) for d in statement.decorator_list):
                continue
            for node in ast.walk(statement):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    stored.setdefault(node.attr, statement)
        found.update(dict.fromkeys(bound_names(statement), statement))
    return {**stored, **found}


def _merged(lists: list[list[Definition]]) -> list[Definition]:
    """The C3 order; if there is none, the first of each list in turn."""
    merged: list[Definition] = []
    while lists := [rest for rest in lists if rest]:
        heads = [rest[0] for rest in lists]
        head = next((h for h in heads if not any(h in rest[1:] for rest in lists)), heads[0])
        merged.append(head)
        lists = [[other for other in rest if other != head] for rest in lists]
    return merged
