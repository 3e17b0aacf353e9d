"""Prompt templates: a small subset of Jinja over a row's columns, bounded in time and size.

The parser checks each node of a template against an allowlist: columns, conditions and a few
filters. Loops, calls and access to attributes or items are not on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import StrictUndefined, Undefined, nodes
from jinja2.sandbox import SandboxedEnvironment

# Together these limits keep the text that a template makes for one row below 10 MB: a character
# in upper case can be three.
_MAX_TEMPLATE_CHARACTERS = 20_000
_MAX_VALUE_CHARACTERS = 10_000
_MAX_NODES = 1_000
_MAX_DEPTH = 50
_MAX_COLUMN_USES = 300

# What pandas, SQL, JavaScript and spreadsheets write where a value is missing or failed.
_MISSING_VALUE = re.compile(
    r"nan|NaN|NaT|<NA>|None|null|NULL|N/A|n/a|undefined|"
    r"#(N/A|REF!|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|ERROR!)"
)

_FILTERS = ("capitalize", "d", "default", "length", "lower", "title", "trim", "truncate", "upper")
_TESTS = ("defined", "undefined")
_ALLOWED_NODES = (
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
_NODE_DESCRIPTIONS = {
    "For": "a loop",
    "Macro": "a macro",
    "CallBlock": "a macro",
    "Call": "a call",
    "Getattr": "attribute access (`.`)",
    "Getitem": "item access (`[]`)",
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


class _EmptyCell(Undefined):
    """Value of an empty cell: false in a condition, an error when it is printed."""

    __slots__ = ()
    __hash__ = Undefined.__hash__

    def __str__(self) -> str:
        raise jinja2.UndefinedError(self._undefined_message)

    def __eq__(self, other: object) -> bool:
        return other == ""

    def __ne__(self, other: object) -> bool:
        return other != ""


def _build_environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    environment.tests = {name: environment.tests[name] for name in _TESTS}
    environment.globals = {}
    return environment


_ENVIRONMENT = _build_environment()


@dataclass(frozen=True, slots=True)
class Template:
    """A template that passed the checks, and the columns that it uses."""

    columns: frozenset[str]
    _compiled: jinja2.Template

    def render(self, cells: Mapping[str, str]) -> str:
        """Render the text for a row.

        In a template, `_` replaces each run of characters of a column's name that are not letters
        or digits: `photo title` becomes `photo_title`.

        Raises:
            ValueError: A column is missing, empty or too long, or a filter failed; the message
                names the cause.
        """
        values = {name: _get_value(name, cells) for name in self.columns}
        try:
            return self._compiled.render(values).strip()
        except jinja2.UndefinedError as error:
            raise ValueError(error.message) from None
        except Exception as error:  # noqa: BLE001 - filters take arguments of any type
            raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from None


def is_missing_value(text: str) -> bool:
    """Return whether a text is what programs write for a missing value, such as `nan`."""
    return _MISSING_VALUE.fullmatch(text) is not None


def is_template(text: str) -> bool:
    """Return whether a text contains template markup."""
    return "{{" in text or "{%" in text


@lru_cache(maxsize=256)
def parse_template(text: str) -> Template:
    """Check and compile a template; results are cached.

    Raises:
        ValueError: The template is invalid or uses something that is not allowed; the message
            names it.
    """
    if len(text) > _MAX_TEMPLATE_CHARACTERS:
        raise ValueError(
            f"the template has {len(text):,} characters; at most "
            f"{_MAX_TEMPLATE_CHARACTERS:,} are allowed"
        )
    try:
        parsed = _ENVIRONMENT.parse(text)
    except RecursionError:
        raise ValueError("the template is nested too deeply") from None
    except (jinja2.TemplateError, ValueError) as error:
        reason = str(error)[:200].rstrip(".")
        raise ValueError(f"the template cannot be read: {reason}") from None
    columns: set[str] = set()
    _check_nodes(parsed, columns)
    return Template(frozenset(columns), _ENVIRONMENT.from_string(parsed))


def _check_nodes(parsed: nodes.Template, columns: set[str]) -> None:
    pending: list[tuple[nodes.Node, int]] = [(parsed, 0)]
    count = uses = 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if count > _MAX_NODES:
            raise ValueError(f"the template has more than {_MAX_NODES:,} parts")
        if depth > _MAX_DEPTH:
            raise ValueError("the template is nested too deeply")
        if problem := _find_problem(node):
            raise ValueError(
                f"the template uses {problem}; allowed are columns, strings, if and else, "
                f"comparisons, and, or, not, ~, and the filters {', '.join(_FILTERS)}"
            )
        if isinstance(node, nodes.Name):
            columns.add(node.name)
            uses += 1
            if uses > _MAX_COLUMN_USES:
                raise ValueError(f"the template uses columns more than {_MAX_COLUMN_USES} times")
        inside = [(child, depth + 1) for child in node.iter_child_nodes()]
        pending += reversed(inside)  # reports the first problem in reading order


def _find_problem(node: nodes.Node) -> str | None:
    kind = type(node).__name__
    if not isinstance(node, _ALLOWED_NODES):
        return _NODE_DESCRIPTIONS.get(kind, f"`{kind}`")
    if isinstance(node, nodes.Name) and node.name == "self":
        return "`self`"
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        return f"the filter `{node.name}`"
    if isinstance(node, nodes.Test) and node.name not in _TESTS:
        return f"the test `{node.name}`"
    if isinstance(node, nodes.Filter | nodes.Test) and (node.dyn_args or node.dyn_kwargs):
        return "a call with `*`"
    return None


def _get_value(name: str, cells: Mapping[str, str]) -> Any:
    column = name
    if name not in cells:
        matches = (column for column in cells if re.sub(r"\W+", "_", column) == name)
        column = next(matches, "")
    if column not in cells:
        available = ", ".join(cells)[:200]
        return StrictUndefined(hint=f"there is no column {name!r}; there are {available}")
    text = cells[column].strip()
    if not text:
        return _EmptyCell(hint=f"the column {column!r} is empty")
    if is_missing_value(text):
        return _EmptyCell(hint=f"the column {column!r} is {text!r}, a missing value")
    if len(text) > _MAX_VALUE_CHARACTERS:
        raise ValueError(
            f"the column {column!r} has {len(text):,} characters; a template takes "
            f"at most {_MAX_VALUE_CHARACTERS:,}"
        )
    return text
