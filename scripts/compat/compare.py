"""Differences between the names that TokenCake uses of a package and one version of it, and between two versions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from scripts.compat.signatures import calls_of, kind_of, refusal, signature_of
from scripts.compat.sources import Definition, Sources, members, package_of
from scripts.compat.uses import Attribute, Import, NamedCall, SourceLine, Uses

_DATACLASS_BASES: Final = ("NamedTuple", "Struct", "BaseModel")


@dataclass(frozen=True, slots=True)
class Difference:
    """`what` is needed at `place`, and what the version has `instead`."""

    place: SourceLine
    what: str
    instead: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}: {self.instead}"


@dataclass(slots=True)
class Reading:
    """The result for one version."""

    differences: list[Difference] = field(default_factory=list)
    overridden: dict[str, tuple[SourceLine, str]] = field(default_factory=dict)
    """Overriding method -> (its place, the overridden class and signature)."""
    imports: int = 0
    names: set[str] = field(default_factory=set)
    """Members of all classes in the modules that TokenCake imports from."""


def read(uses: Uses, sources: Sources, package: str, files: dict[str, str]) -> Reading:
    """All differences in `sources`, which contain `package` and TokenCake's modules. `files`: own module -> file."""
    comparison = _Comparison(uses, sources, package, files)
    comparison.compare()
    return comparison.reading


class _Comparison:
    def __init__(self, uses: Uses, sources: Sources, package: str, files: dict[str, str]) -> None:
        self._uses, self._sources, self._package, self._files = uses, sources, package, files
        self.reading = Reading()

    def compare(self) -> None:
        self._compare_imports()
        for attribute in self._uses.attributes:
            self._compare_attribute(attribute)
        for attribute in self._uses.selves:
            self._compare_self(attribute)
        for call in self._uses.calls:
            self._compare_call(call)
        for cls in self._uses.classes:
            self._compare_class(cls)
        for module in {one.module for one in self._uses.imports}:
            if (found := self._sources.module(module)) is not None:
                classes = [Definition("class", module, name, node) for name, node in found.names.items()]
                self.reading.names.update(name for cls in classes for name in members(cls))

    def _differ(self, place: SourceLine, what: str, instead: str) -> None:
        difference = Difference(place, what, instead)
        if difference not in self.reading.differences:
            self.reading.differences.append(difference)

    # --- names ------------------------------------------------------------------------------------------

    def _compare_imports(self) -> None:
        found = {one for one in self._uses.imports if self._has(one)}
        met = {one.alternatives for one in found if one.alternatives is not None}
        self.reading.imports = len({(one.module, one.name) for one in self._uses.imports})
        for one in self._uses.imports:
            if one not in found and one.alternatives not in met:
                what = f"import {one.module}" if one.name is None else f"from {one.module} import {one.name}"
                self._differ(one.place, what, self._elsewhere(one.name or one.module.rpartition(".")[2]))

    def _has(self, one: Import) -> bool:
        if one.name is None:
            return self._sources.module(one.module) is not None
        return self._sources.resolve(one.module, one.name) is not None

    def _elsewhere(self, name: str) -> str:
        homes = self._sources.homes(self._package, name)
        return f"missing; `{name}` is in {', '.join(homes[:3])}" if homes else f"missing; no module defines `{name}`"

    def _compare_attribute(self, attribute: Attribute) -> None:
        if attribute.owner is None:
            if self._sources.resolve(attribute.module, attribute.name) is None:
                self._differ(attribute.place, f"{attribute.module}.{attribute.name}", self._elsewhere(attribute.name))
            return
        owner = self._sources.resolve(attribute.module, attribute.owner)
        if owner is None:
            return  # already reported for the import
        if owner.kind == "module":
            self._compare_attribute(Attribute(attribute.place, owner.module, None, attribute.name))
        elif owner.kind == "class" and not self._sources.may_have(owner, attribute.name):
            self._differ(attribute.place, f"{owner.path}.{attribute.name}", self._lookalike(owner, attribute.name))

    def _lookalike(self, cls: Definition, name: str) -> str:
        bare = name.strip("_")
        others = {other for base in self._sources.order(cls) for other in members(base)}
        like = sorted(other for other in others if other.strip("_") == bare or (len(bare) > 4 and bare in other))  # noqa: PLR2004
        return f"missing; there is {', '.join(f'`{other}`' for other in like[:3])}" if like else "missing"

    def _compare_self(self, attribute: Attribute) -> None:
        cls = self._ours(attribute)
        if self._bases(cls) and not self._sources.may_have(cls, attribute.name):
            base = self._bases(cls)[0]
            self._differ(
                attribute.place, f"self.{attribute.name} of {base.path}", self._lookalike(base, attribute.name)
            )

    def _ours(self, one: Attribute | NamedCall) -> Definition:
        return next(c for c in self._uses.classes if (c.module, c.name) == (one.module, one.owner))

    def _bases(self, cls: Definition) -> list[Definition]:
        """The classes of the package that `cls` inherits from."""
        return [base for base in self._sources.order(cls) if package_of(base.module) == self._package]

    # --- calls ------------------------------------------------------------------------------------------

    def _compare_call(self, one: NamedCall) -> None:
        if one.owner is not None:
            self._compare_super(one)
            return
        callee = self._sources.resolve(one.module, one.name)
        if callee is None or callee.kind not in ("class", "function"):
            return
        if callee.kind == "function":
            self._compare_arguments(one, callee.path, callee.node, is_method=False)
        elif (init := self._sources.member(callee, "__init__")) is not None:
            self._compare_arguments(one, callee.path, init[1], is_method=True)
        else:
            self._compare_fields(one, callee)

    def _compare_super(self, one: NamedCall) -> None:
        cls = self._ours(one)
        after = self._sources.order(cls)[1:]
        found = next(((owner, members(owner)[one.name]) for owner in after if one.name in members(owner)), None)
        if found is not None:
            if package_of(found[0].module) == self._package:
                self._compare_arguments(one, f"{found[0].path}.{one.name}", found[1], is_method=True)
        elif self._bases(cls) and not self._sources.may_have(self._bases(cls)[0], one.name):
            base = self._bases(cls)[0]
            self._differ(one.place, f"super().{one.name} of {base.path}", self._lookalike(base, one.name))

    def _compare_arguments(self, one: NamedCall, path: str, function: ast.AST | None, *, is_method: bool) -> None:
        if kind_of(function or ast.Pass()) in ("value", "property"):
            return
        signature = signature_of(function, is_method=is_method)
        if (why := refusal(signature, one.call)) is not None:
            self._differ(one.place, f"call of {path}", f"{why}; it takes {signature}")

    def _compare_fields(self, one: NamedCall, cls: Definition) -> None:
        """For dataclasses and similar classes, compare keyword arguments with fields; mypy checks the required ones."""
        order = self._sources.order(cls)
        nodes = [base.node for base in order if isinstance(base.node, ast.ClassDef)]
        is_data = any("dataclass" in ast.unparse(d) for node in nodes for d in node.decorator_list)
        if not is_data and not any(base.name in _DATACLASS_BASES for base in order):
            return
        fields = {name for base in order for name, node in members(base).items() if isinstance(node, ast.AnnAssign)}
        for name in one.call.keywords:
            if name not in fields and self._sources.member(cls, "__getattr__") is None:
                self._differ(one.place, f"{cls.path}({name}=...)", f"no such field; it has {', '.join(sorted(fields))}")

    # --- overrides --------------------------------------------------------------------------------------

    def _compare_class(self, cls: Definition) -> None:
        if not self._bases(cls):
            return
        order = self._sources.order(cls)
        for name, (owner, method) in self._methods(order).items():
            found = next(
                (
                    (b, members(b)[name])
                    for b in order[order.index(owner) + 1 :]
                    if name in members(b) and b in self._bases(cls)
                ),
                None,
            )
            if found is not None:
                self._compare_override(owner, method, *found)
        for name, base in self._abstract(order):
            self._differ(
                self._place(cls, cls.node),
                f"{cls.name} as {base.path}",
                f"`{name}` is abstract there and not implemented here",
            )

    def _methods(self, order: list[Definition]) -> dict[str, tuple[Definition, ast.AST]]:
        """TokenCake's own methods by name, the first of each in the resolution order."""
        found: dict[str, tuple[Definition, ast.AST]] = {}
        for cls in order:
            if package_of(cls.module) != self._package:
                for name, node in members(cls).items():
                    if name != "__init__" and kind_of(node) != "value" and getattr(node, "name", None) == name:
                        found.setdefault(name, (cls, node))
        return found

    def _abstract(self, order: list[Definition]) -> Iterator[tuple[str, Definition]]:
        seen: set[str] = set()
        for base in order:
            for name, node in members(base).items():
                decorators = getattr(node, "decorator_list", [])
                is_abstract = any(ast.unparse(d).endswith("abstractmethod") for d in decorators)
                if is_abstract and name not in seen and package_of(base.module) == self._package:
                    yield name, base
                seen.add(name)

    def _place(self, cls: Definition, node: ast.AST | None) -> SourceLine:
        return SourceLine(self._files[cls.module], getattr(node, "lineno", 1))

    def _compare_override(self, owner: Definition, method: ast.AST, base: Definition, theirs: ast.AST) -> None:
        place, path = self._place(owner, method), f"{owner.name}.{getattr(method, 'name', '')}"
        what = f"{path} overrides {base.path}"
        if kind_of(method) != kind_of(theirs):
            is_field = kind_of(theirs) == "value" and kind_of(method) == "property"
            if not is_field:
                self._differ(place, what, f"ours is a {kind_of(method)}, vLLM's a {kind_of(theirs)}")
            return
        if kind_of(method) == "property":
            self.reading.overridden[path] = place, f"{base.path}, a property"
            return
        ours, expected = signature_of(method, is_method=True), signature_of(theirs, is_method=True)
        self.reading.overridden[path] = place, f"{base.path}{expected}"
        if (why := next((why for call in calls_of(expected) if (why := refusal(ours, call))), None)) is not None:
            self._differ(place, what, f"{why}; ours is {ours}, vLLM's {expected}")


def removed(older: Reading, newer: Reading, uses: Uses, known: set[str]) -> list[Difference]:
    """Names that an older version had and a newer one lacks: overridden methods, and attributes of objects.

    Args:
        older: a version.
        newer: a later version, or an earlier one to find what is new.
        uses: the names that TokenCake uses.
        known: names that also exist in TokenCake's own classes and in Python's types.
    """
    found = [
        Difference(place, f"{path} overrides {base}", "removed: nothing calls it")
        for path, (place, base) in older.overridden.items()
        if path not in newer.overridden
    ]
    gone = older.names - newer.names - known
    return found + [
        Difference(place, f".{name}", "no imported class of the package has it any more")
        for name, place in sorted(uses.others.items())
        if name in gone
    ]
