"""How Sphinx makes the documentation: `make docs`, then open docs/_build/index.html."""

import inspect
import re
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

# The code beside these pages is documented, whatever version is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from generated import command_line, write_page
from prefect import Flow, Task
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from pygments.lexers.data import JsonLexer
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

import prefect_flux_kontext

project = "prefect-flux-kontext"
author = "The prefect-flux-kontext authors"
release = prefect_flux_kontext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
nitpicky = False

html_theme = "furo"
html_title = project

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False

PARAMETER_TYPES = {
    "manifest": "str | Path | list[dict] | Arrow table",
    "output": "str | Path | Block",
    "storage_options": "dict | str | Block | None",
}
"""Types of parameters whose annotations only say how Prefect validates and shows them."""


def function_of(documented: Any) -> Any:
    """Return the function of a task or flow, and anything else as it is."""
    return documented.fn if isinstance(documented, Task | Flow) else documented


def type_name(annotation: Any) -> str:
    """Return an annotation as a reader would write it."""
    text = stringify_annotation(_without_metadata(annotation))
    return re.sub(r"(?:\w+\.)+(?=\w)", "", text)  # without modules


def _without_metadata(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return _without_metadata(annotation.__origin__)
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return Union[tuple(map(_without_metadata, get_args(annotation)))]  # noqa: UP007
    if get_origin(annotation) is list:
        return list[_without_metadata(*get_args(annotation))]
    return annotation


class _Shown:
    """A default that is a class or function, shown by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    @classmethod
    def of(cls, default: Any) -> Any:
        named = default is not inspect.Parameter.empty and hasattr(default, "__name__")
        return cls(default.__name__) if named else default


def short_signature(documented: Any, *, method: bool = False) -> tuple[str, str]:
    """Return parameters with their defaults, and the type of the result."""
    signature = inspect.signature(documented, eval_str=False)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_Shown.of(parameter.default))
        for parameter in signature.parameters.values()
    ]
    bare = signature.replace(
        parameters=parameters[1:] if method else parameters,
        return_annotation=inspect.Signature.empty,
    )
    returns = inspect.get_annotations(documented).get("return", "")
    return str(bare), returns if isinstance(returns, str) else type_name(returns)


def show_signature(
    app: Sphinx,  # noqa: ARG001 - Sphinx passes them all
    what: str,
    name: str,  # noqa: ARG001
    documented: Any,
    options: Any,  # noqa: ARG001
    signature: str | None,  # noqa: ARG001
    returns: str | None,  # noqa: ARG001
) -> tuple[str, str] | None:
    """Show parameters by name and default alone: their types are listed below."""
    if what == "class":
        if issubclass(documented, BaseModel):
            return "", ""
        parameters, _ = short_signature(documented.__init__, method=True)
        return parameters, ""
    if what in ("function", "method"):
        return short_signature(function_of(documented), method=what == "method")
    return None


def as_code(text: str) -> str:
    """Turn Markdown's `code` into that of reStructuredText."""
    return re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", text)


def read_markdown(
    app: Sphinx,  # noqa: ARG001
    what: str,
    name: str,  # noqa: ARG001
    documented: Any,  # noqa: ARG001
    options: Any,  # noqa: ARG001
    lines: list[str],
) -> None:
    """Turn code of a docstring into reStructuredText: Prefect shows docstrings as Markdown."""
    if what == "property":
        # Napoleon would take what is before a colon for a type.
        lines[0] = lines[0].replace(": ", " - ", 1)
    text = as_code("\n".join(lines))
    fenced = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    lines[:] = fenced.sub(_code_block, text).split("\n")


def _code_block(found: re.Match[str]) -> str:
    indent, code = found.groups()
    body = "".join(f"    {line}" if line.strip() else line for line in code.splitlines(True))
    return f"\n{indent}.. code-block:: python\n\n{body}"


def list_types(
    app: Sphinx,  # noqa: ARG001
    what: str,
    name: str,  # noqa: ARG001
    documented: Any,
    options: Any,  # noqa: ARG001
    lines: list[str],
) -> None:
    """Add the types of the parameters that a docstring describes, and the fields of a model."""
    if isinstance(documented, Task | Flow):
        annotations = inspect.get_annotations(documented.fn, eval_str=True)
    elif what == "class" and not issubclass(documented, BaseModel):
        annotations = inspect.get_annotations(documented.__init__)
    elif what in ("function", "method"):
        annotations = inspect.get_annotations(documented)
    else:
        annotations = {}
    described = {line.split(":")[1].removeprefix("param ") for line in lines if ":param " in line}
    for parameter in described & annotations.keys():
        kind = annotations[parameter]
        shown = kind if isinstance(kind, str) else type_name(kind)
        if isinstance(documented, Task | Flow):
            shown = PARAMETER_TYPES.get(parameter, shown)
        lines.append(f":type {parameter}: {shown}")
    if what == "class" and issubclass(documented, BaseModel):
        lines.append("")
        for field, info in documented.model_fields.items():
            default = ""
            if info.default is not PydanticUndefined and info.default is not None:
                default = f" Default: ``{info.default!r}``."
            description = " ".join((info.description or "").split())
            lines.append(f":param {field}: {as_code(description)}{default}")
            lines.append(f":type {field}: {type_name(info.annotation)}")
        lines.append("")


def setup(app: Sphinx) -> None:
    """Connect what shows the API, and name the languages of data that Pygments does not know."""
    app.connect("autodoc-process-signature", show_signature)
    # Napoleon comes at 500, and would take the types for a paragraph.
    app.connect("autodoc-process-docstring", read_markdown, priority=100)
    app.connect("autodoc-process-docstring", list_types, priority=900)
    app.add_lexer("csv", TextLexer)
    app.add_lexer("jsonl", JsonLexer)


write_page(Path(__file__).parent / "_generated" / "cli.md", command_line())
