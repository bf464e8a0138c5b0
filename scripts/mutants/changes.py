"""Mutants of a file: each changes one operator or number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

BUILT_IN: Final = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_GtE", "GtE_Lt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("LtE_Gt", "Gt_LtE", "Eq_NotEq", "NotEq_Eq", "Is_IsNot")),
    *("ReplaceComparisonOperator_IsNot_Is", "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot", "NumberReplacer"),
)
SWAPS: Final = {"+=": "-=", "-=": "+=", "min": "max", "max": "min"}


class Swap(Operator):  # type: ignore[misc]  # Cosmic Ray has no types
    """What Cosmic Ray lacks: `+=` for `-=`, and `min` for `max`."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Where a token of `SWAPS` stands."""
        if node.type in ("name", "operator") and node.value in SWAPS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:  # noqa: ARG002  # Cosmic Ray's signature
        """The other one."""
        return type(node)(SWAPS[node.value], node.start_pos, node.prefix)

    examples = classmethod(lambda cls: ())  # noqa: ARG005  # asked for by Cosmic Ray


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    operator: Any
    occurrence: int
    lines: range
    """From the begin of the changed statement to the change."""


def mutants_of(path: str) -> Iterator[Mutant]:
    """All changes of a file."""
    nodes = list(ast_nodes(get_ast(Path(path).read_text(encoding="utf-8"))))
    for operator in (*(get_operator(f"core/{name}")() for name in BUILT_IN), Swap()):
        found = [(node, position) for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (node, ((line, _), _)) in enumerate(found):
            statement = node
            while statement.parent is not None and statement.parent.type not in ("suite", "file_input"):
                statement = statement.parent
            if is_meant(node, statement.get_code(include_prefix=False)):
                yield Mutant(path, operator, occurrence, range(statement.start_pos[0], line + 1))


def is_meant(node: Any, statement: str) -> bool:
    """Numbers count where they are whole and in a function: constants and settings are tuned, not tested."""
    is_tuned = node.type == "number" and not (node.value.isdigit() and node.search_ancestor("funcdef", "lambdef"))
    is_star = node.parent is not None and node.parent.type in ("parameters", "param")  # `*`, which is no product there
    return not is_tuned and not is_star and not statement.startswith("if TYPE_CHECKING")
