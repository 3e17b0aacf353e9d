"""Prompt templates: a small part of Jinja over a row's columns, whose work and size are bounded.

What a template may hold is a list of what is allowed, looked at when it is parsed: columns,
conditions, a few filters. There is nothing in it that repeats, calls or reaches inside a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import StrictUndefined, Undefined, nodes
from jinja2.sandbox import SandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST_TEMPLATE = 20_000
_LONGEST_VALUE = 10_000
_MOST_NODES = 1_000
_DEEPEST = 50
"""Together: no template makes more than 10 MB of text on its way to a prompt."""

_FILTERS = (
    "capitalize",
    "d",
    "default",
    "length",
    "lower",
    "title",
    "trim",
    "truncate",
    "upper",
)
_TESTS = ("defined", "undefined")
_ALLOWED = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.If,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Concat,
    nodes.Filter,
    nodes.Keyword,
    nodes.Test,
)
_TOLD = {
    "For": "a loop",
    "Macro": "a macro",
    "CallBlock": "a macro",
    "Call": "a call",
    "Getattr": "a look inside a value (`.`)",
    "Getitem": "a look inside a value (`[]`)",
    "Assign": "`set`",
    "AssignBlock": "`set`",
    "Include": "an include",
    "Import": "an import",
    "FromImport": "an import",
    "Extends": "`extends`",
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow", "Neg", "Pos"), "arithmetic"
    ),
    **dict.fromkeys(("List", "Tuple", "Dict"), "a list"),
}


class _Empty(Undefined):
    """A cell with nothing in it: false when it is asked for, refused when it is to be printed."""

    __slots__ = ()
    __hash__ = Undefined.__hash__

    def __str__(self) -> str:
        raise jinja2.UndefinedError(self._undefined_message)

    def __eq__(self, other: object) -> bool:
        return other == ""

    def __ne__(self, other: object) -> bool:
        return other != ""


def _environment() -> SandboxedEnvironment:
    made = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    made.filters = {name: made.filters[name] for name in _FILTERS}
    made.tests = {name: made.tests[name] for name in _TESTS}
    made.globals = {}
    return made


_ENVIRONMENT = _environment()


@dataclass(frozen=True, slots=True)
class Template:
    """A template that was looked through.

    Attributes:
        columns: The columns that it names.
    """

    columns: frozenset[str]
    _compiled: jinja2.Template

    def render(self, cells: Mapping[str, str]) -> str:
        """The text for a row.

        Args:
            cells: Column name to text. A column whose name is no word is reached with `_` in
                place of what is not a letter or digit: `photo title` as `photo_title`.

        Raises:
            ValueError: The row has not what the template names; says what that is.
        """
        values = {name: _value(name, cells) for name in self.columns}
        try:
            return self._compiled.render(values).strip()
        except jinja2.UndefinedError as error:
            raise ValueError(error.message) from None
        except Exception as error:  # noqa: BLE001 - a filter may be given anything
            raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from None


def is_template(text: str) -> bool:
    """Whether a text is more than itself."""
    return "{{" in text or "{%" in text


@lru_cache(maxsize=256)
def parse_template(text: str) -> Template:
    """Look through a template and make it ready; each is made once.

    Raises:
        ValueError: It is none, or holds what is not allowed; says what that is.
    """
    if len(text) > _LONGEST_TEMPLATE:
        raise ValueError(
            f"a template of {len(text):,} characters; it has at most {_LONGEST_TEMPLATE:,}"
        )
    try:
        parsed = _ENVIRONMENT.parse(text)
    except RecursionError:
        raise ValueError("the template is nested too deeply") from None
    except (jinja2.TemplateError, ValueError) as error:
        told = str(error)[:200].rstrip(".")
        raise ValueError(f"the template cannot be read: {told}") from None
    columns: set[str] = set()
    _look_through(parsed, columns)
    return Template(frozenset(columns), _ENVIRONMENT.from_string(parsed))


def _look_through(parsed: nodes.Template, columns: set[str]) -> None:
    waiting: list[tuple[nodes.Node, int]] = [(parsed, 0)]
    seen = 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if seen > _MOST_NODES:
            raise ValueError(f"the template has more than {_MOST_NODES:,} parts")
        if depth > _DEEPEST:
            raise ValueError("the template is nested too deeply")
        if problem := _problem_of(node):
            raise ValueError(
                f"the template holds {problem}; it may hold columns, texts, if and else, "
                f"comparisons, and, or, not, ~, and the filters {', '.join(_FILTERS)}"
            )
        if isinstance(node, nodes.Name):
            columns.add(node.name)
        inside = [(child, depth + 1) for child in node.iter_child_nodes()]
        waiting += reversed(inside)  # so that the first problem is told


def _problem_of(node: nodes.Node) -> str | None:
    kind = type(node).__name__
    if not isinstance(node, _ALLOWED):
        return _TOLD.get(kind, f"`{kind}`")
    if isinstance(node, nodes.Name) and node.name == "self":
        return "`self`"
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        return f"the filter `{node.name}`"
    if isinstance(node, nodes.Test) and node.name not in _TESTS:
        return f"the test `{node.name}`"
    if isinstance(node, nodes.Filter | nodes.Test) and (node.dyn_args or node.dyn_kwargs):
        return "a call with `*`"
    return None


def _value(name: str, cells: Mapping[str, str]) -> Any:
    column = name
    if name not in cells:
        spelled = (column for column in cells if re.sub(r"\W+", "_", column) == name)
        column = next(spelled, "")
    if column not in cells:
        there = ", ".join(cells)[:200]
        return StrictUndefined(hint=f"there is no column {name!r}; there are {there}")
    text = cells[column].strip()
    if not text:
        return _Empty(hint=f"the column {column!r} is empty")
    if len(text) > _LONGEST_VALUE:
        raise ValueError(
            f"the column {column!r} has {len(text):,} characters; in a template it has at most "
            f"{_LONGEST_VALUE:,}"
        )
    return text
