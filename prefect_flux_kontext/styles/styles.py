"""Styles: named prompt templates with parameters, built in or read from a file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.models import (
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
    RequestedRatio,
)
from prefect_flux_kontext.references.remote import open_source
from prefect_flux_kontext.storage.names import find_text_problem
from prefect_flux_kontext.styles.templates import Template, parse_template

_BUILTIN_FILE = Path(__file__).with_name("builtin.yaml")
# A style's name is a part of its images' file names.
_MAX_NAME_LENGTH = 60
# Far more than any real file of styles; bounds the memory that a wrong URL can take.
_MAX_FILE_BYTES = 1_000_000
# A message lists this many problems and counts the rest.
_MAX_PROBLEMS_LISTED = 20
_REQUEST_FIELDS = frozenset(GenerationRequest.model_fields)


class Style(BaseModel):
    """A named prompt template and the parameters that go with it.

    Raises:
        ValidationError: A field is invalid; the error lists every problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(min_length=1, max_length=_MAX_NAME_LENGTH)
    """Part of the names of its images."""
    prompt: str = Field(min_length=1)
    """A template over the row's columns. `{{ prompt }}` inserts the row's own prompt; without it,
    the row's prompt is appended."""
    mode: Mode | None = None
    """`pro` or `max`."""
    aspect_ratio: RequestedRatio | None = None
    """Ratio of width to height."""
    output_format: OutputFormat | None = None
    """Format of the result."""
    provider: Provider | None = None
    """Route that the service uses."""
    variants: int = Field(default=1, ge=1, le=20)
    """Images to make of each row, each paid for."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further input, passed to the model as it is."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        problem = find_text_problem(name)
        if problem is None and ("/" in name or "\\" in name):
            problem = "holds a slash"
        elif problem is None and is_style_file(name):
            problem = "has the extension of a styles file"
        elif problem is None and name != name.strip():
            problem = "begins or ends with a space"
        if problem:
            raise ValueError(f"the name {problem}")
        return name

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        parse_template(prompt)
        return prompt

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        # A request field in `extra` would bypass the plan, the price and the row's key.
        if known := sorted(_REQUEST_FIELDS & set(extra)):
            raise ValueError(
                f"extra must not set {', '.join(known)}; set it as a field of the style"
            )
        GenerationRequest(prompt="x", extra=extra)
        return extra

    @cached_property
    def _template(self) -> Template:
        return parse_template(self.prompt)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The request fields that the style sets, without the prompt."""
        return self.model_dump(
            exclude={"name", "prompt", "variants"}, exclude_none=True, exclude_defaults=True
        )

    def render_prompt(self, prompt: str | None, cells: Mapping[str, str]) -> str:
        """Render the prompt for a row.

        Raises:
            ValueError: A column that the template names is missing, empty or too long.
        """
        rendered = self._template.render({**cells, "prompt": prompt or "", "style": self.name})
        if prompt and "prompt" not in self._template.columns:
            return f"{rendered}\n{prompt}"
        return rendered


class Styles(NamedTuple):
    """The styles that a row may name, and those for rows that name none, in their order."""

    known: Mapping[str, Style]
    chosen: Sequence[Style]


def is_style_file(text: str) -> bool:
    """Return whether a text names a file of styles rather than a style."""
    return text.lower().endswith((".yaml", ".yml", ".json"))


@cache
def builtin_styles() -> dict[str, Style]:
    """Return the styles of the package, by name."""
    return {style.name: style for style in read_styles(str(_BUILTIN_FILE))}


def get_builtin_style(name: str) -> Style:
    """Return a style of the package.

    Raises:
        ConfigurationError: There is no such style.
    """
    known = builtin_styles()
    if name not in known:
        raise ConfigurationError(f"There {describe_unknown_style(name, known)}.")
    return known[name]


def select_styles(styles: str | Sequence[str] | None) -> Styles:
    """Resolve names of styles, and paths or URLs of files of styles (`.yaml`, `.yml`, `.json`).

    A file adds all of its styles; they replace built-in styles of the same name.

    Raises:
        ConfigurationError: A file is unreadable or invalid, or a name is unknown.
    """
    named = [styles] if isinstance(styles, str) else list(styles or ())
    files = {text: read_styles(text) for text in named if is_style_file(text)}
    own: dict[str, str] = {}
    for file, read in files.items():
        for style in read:
            if (other := own.setdefault(style.name, file)) != file:
                raise ConfigurationError(f"The style {style.name!r} is in {other} and in {file}.")
    known = builtin_styles() | {style.name: style for read in files.values() for style in read}
    chosen: dict[str, Style] = {}
    unknown = []
    for text in named:
        if text in files:
            chosen |= {style.name: style for style in files[text]}
        elif text in known:
            chosen[text] = known[text]
        else:
            unknown.append(describe_unknown_style(text, known))
    if unknown:
        raise ConfigurationError(f"There {'; '.join(unknown)}.")
    return Styles(known, tuple(chosen.values()))


def describe_unknown_style(name: str, known: Mapping[str, Style]) -> str:
    """Return the problem with an unknown name of a style, to follow the word "there"."""
    near = difflib.get_close_matches(name[:100], known, n=1)
    meant = f", did you mean {near[0]!r}?" if near else ""
    return f"is no style {name!r:.80}{meant} (there are {', '.join(known)[:400]})"


def read_styles(url: str) -> list[Style]:
    """Read a file of styles: a mapping from name to prompt, or to `prompt` and parameters.

    Raises:
        ConfigurationError: The file is unreadable or invalid; the message lists every problem
            of the file, up to a limit.
    """
    if "::" in url:
        raise ConfigurationError(f"The styles {url} chain several filesystems; use a single URL.")
    try:
        with open_source(url) as (file, _):
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"There are no styles at {url}.") from None
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        reason = str(error) or type(error).__name__
        raise ConfigurationError(f"The styles {url} cannot be read: {reason}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigurationError(f"The styles {url} have more than {_MAX_FILE_BYTES:,} bytes.")
    try:
        text = data.decode("utf-8-sig")
        if url.lower().endswith(".json"):
            read = json.loads(text, object_pairs_hook=_reject_repeated_names)
        else:
            read = yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a SafeLoader
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"The styles {url} cannot be read: {_describe(error)}.") from None
    if not isinstance(read, dict) or not read:
        raise ConfigurationError(
            f"The styles {url} are not a mapping from names to prompts, such as `ink: Redraw it "
            "in ink`."
        )
    return _build_styles(url, read)


def _build_styles(url: str, read: dict[Any, Any]) -> list[Style]:
    styles, problems = [], []
    names: dict[str, Any] = {}
    for name, value in read.items():
        shown = f"{name!r:.80}"
        if not isinstance(name, str):
            problems.append(f"the name {shown} is not text; put it in quotes")
            continue
        if (other := names.setdefault(name.casefold(), name)) != name:
            problems.append(f"{shown} and {other!r:.80} differ only in case")
        fields = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not all(isinstance(field, str) for field in fields):
            problems.append(f"{shown} must be a prompt or a mapping")
        elif "name" in fields:
            problems.append(f"{shown} must not set `name`; its key is its name")
        else:
            try:
                styles.append(Style(name=name, **fields))
            except ValidationError as error:
                problems += [
                    f"{shown}: {_describe_problem(problem)}" for problem in error.errors()
                ]
    if problems:
        more = (
            f"; and {len(problems) - _MAX_PROBLEMS_LISTED:,} more"
            if len(problems) > _MAX_PROBLEMS_LISTED
            else ""
        )
        raise ConfigurationError(
            f"The styles {url} have mistakes: {'; '.join(problems[:_MAX_PROBLEMS_LISTED])}{more}."
        )
    return styles


def _describe_problem(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])[:80]
    if problem["type"] == "extra_forbidden":
        fields = ", ".join(name for name in Style.model_fields if name != "name")
        return f"there is no field `{where}`; there are {fields}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    return f"{where} {problem['input']!r:.60}: {problem['msg']}"


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # it ships no types
    """YAML loader that rejects aliases, which allow exponential documents, and repeated names."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (`*`) are not allowed; repeat the text instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        _reject_repeated_names([(repr(name), None) for name in names])
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _reject_repeated_names(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({str(name) for name in names if names.count(name) > 1})
        raise ValueError(f"it names {', '.join(repeated)[:100]} twice")
    return mapping


def _describe(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not in UTF-8"
    return " ".join(str(error).split())[:300].rstrip(".")
