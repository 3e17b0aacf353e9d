"""A style: a name for a prompt and its parameters, to be used on many images."""

from __future__ import annotations

import difflib
import json
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.models import (
    AspectRatio,
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
)
from prefect_flux_kontext.storage.names import find_text_problem
from prefect_flux_kontext.styles.templates import Template, parse_template

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

_LONGEST_NAME = 60
_FIELDS = frozenset(GenerationRequest.model_fields)


class Style(BaseModel):
    """A style by its name.

    Raises:
        ValidationError: It is none; all that is wrong with it is told at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=_LONGEST_NAME, description="Names its images.")
    prompt: str = Field(
        min_length=1,
        description="A template over the row's columns. `{{ prompt }}` is the row's own prompt, "
        "which else comes after it.",
    )
    mode: Mode | None = Field(default=None, description="`pro` or `max`.")
    aspect_ratio: AspectRatio | None = Field(default=None, description="Width to height.")
    output_format: OutputFormat | None = Field(default=None, description="Kind of the result.")
    provider: Provider | None = Field(default=None, description="How the service routes it.")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Further input of the model, as it is."
    )

    @field_validator("name")
    @classmethod
    def _names_a_file(cls, name: str) -> str:
        problem = find_text_problem(name)
        if problem is None and ("/" in name or "\\" in name):
            problem = "holds a slash"
        elif problem is None and is_style_file(name):
            problem = "looks like a file"
        elif problem is None and name != name.strip():
            problem = "begins or ends with a space"
        if problem:
            raise ValueError(f"the name {problem}")
        return name

    @field_validator("prompt")
    @classmethod
    def _prompt_is_a_template(cls, prompt: str) -> str:
        parse_template(prompt)
        return prompt

    @field_validator("extra")
    @classmethod
    def _extra_is_further_input(cls, extra: dict[str, Any]) -> dict[str, Any]:
        # Else it would change unseen what was planned, priced and put into the row's key.
        if known := sorted(_FIELDS & set(extra)):
            raise ValueError(f"extra holds {', '.join(known)}, which has a place of its own")
        GenerationRequest(prompt="x", extra=extra)
        return extra

    @cached_property
    def _template(self) -> Template:
        return parse_template(self.prompt)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """What it sets in a request, without the prompt."""
        return self.model_dump(
            exclude={"name", "prompt"}, exclude_none=True, exclude_defaults=True
        )

    def text(self, prompt: str | None, cells: Mapping[str, str]) -> str:
        """The prompt for a row.

        Args:
            prompt: The row's own prompt, or the one for all rows.
            cells: The row's columns.

        Raises:
            ValueError: The row has not what the style's template names.
        """
        made = self._template.render({**cells, "prompt": prompt or "", "style": self.name})
        if prompt and "prompt" not in self._template.columns:
            return f"{made}\n{prompt}"
        return made


def is_style_file(text: str) -> bool:
    """Whether a text names a file of styles rather than a style."""
    return text.lower().endswith((".yaml", ".yml", ".json"))


_BUILTIN = Path(__file__).with_name("builtin.yaml")
_LARGEST_FILE = 1_000_000
_TOLD = 20


class Styles(NamedTuple):
    """The styles of a batch.

    Attributes:
        known: All that a row may name.
        chosen: Those for rows that name none, in the order in which they were chosen.
    """

    known: Mapping[str, Style]
    chosen: Sequence[Style]


@cache
def builtin_styles() -> dict[str, Style]:
    """The styles that come with the package, by name."""
    return {style.name: style for style in read_styles(str(_BUILTIN))}


def select_styles(styles: str | Sequence[str] | None) -> Styles:
    """Find the styles that a person has named.

    Args:
        styles: Names of styles, and paths or fsspec URLs of files of styles (`.yaml`, `.yml`,
            `.json`). A file adds all that are in it, which replace built-in ones of their name.

    Raises:
        ConfigurationError: A file cannot be used, or there is no style of a name.
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
            unknown.append(unknown_style_error(text, known))
    if unknown:
        raise ConfigurationError(f"There {'; '.join(unknown)}.")
    return Styles(known, tuple(chosen.values()))


def unknown_style_error(name: str, known: Mapping[str, Style]) -> str:
    """What to say of a name that is no style's."""
    near = difflib.get_close_matches(name[:100], known, n=1)
    meant = f", did you mean {near[0]!r}?" if near else ""
    return f"is no style {name!r:.80}{meant} (there are {', '.join(known)[:400]})"


def read_styles(url: str) -> list[Style]:
    """Read a file of styles: a mapping from name to prompt, or to `prompt` and parameters.

    Raises:
        ConfigurationError: It cannot be read or is none; all that is wrong is told at once.
    """
    if "::" in url:
        raise ConfigurationError(f"The styles {url} chain several filesystems; give one URL.")
    try:
        with fsspec.open(url, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"There are no styles at {url}.") from None
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        told = str(error) or type(error).__name__
        raise ConfigurationError(f"The styles {url} cannot be read: {told}") from None
    if len(data) > _LARGEST_FILE:
        raise ConfigurationError(f"The styles {url} have more than {_LARGEST_FILE:,} bytes.")
    try:
        text = data.decode("utf-8-sig")
        read = _from_json(text) if url.lower().endswith(".json") else _from_yaml(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"The styles {url} cannot be read: {_told(error)}.") from None
    if not isinstance(read, dict) or not read:
        raise ConfigurationError(
            f"The styles {url} are not a mapping from names to prompts, such as `ink: Redraw it "
            "in ink`."
        )
    return _made(url, read)


def _made(url: str, read: dict[Any, Any]) -> list[Style]:
    styles, problems = [], []
    names: dict[str, Any] = {}
    for name, value in read.items():
        told = f"{name!r:.80}"
        if not isinstance(name, str):
            problems.append(f"the name {told} is not text; put it in quotes")
            continue
        if (other := names.setdefault(name.casefold(), name)) != name:
            problems.append(f"{told} and {other!r:.80} are equal but for case")
        fields = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not all(isinstance(field, str) for field in fields):
            problems.append(f"{told} is neither a prompt nor a mapping")
        elif "name" in fields:
            problems.append(f"{told} has a field `name`; its name stands before it")
        else:
            try:
                styles.append(Style(name=name, **fields))
            except ValidationError as error:
                problems += [f"{told}: {_problem(problem)}" for problem in error.errors()]
    if problems:
        more = f"; and {len(problems) - _TOLD:,} more" if len(problems) > _TOLD else ""
        raise ConfigurationError(
            f"The styles {url} have mistakes: {'; '.join(problems[:_TOLD])}{more}."
        )
    return styles


def _problem(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])[:80]
    if problem["type"] == "extra_forbidden":
        fields = ", ".join(name for name in Style.model_fields if name != "name")
        return f"there is no field `{where}`; there are {fields}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    return f"{where} {problem['input']!r:.60}: {problem['msg']}"


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_twins)


def _from_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a SafeLoader


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # it ships no types
    """YAML as people write it: no aliases, of which bombs are made, and no name twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it holds an alias (`*`); write the text again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        _without_twins([(repr(name), None) for name in names])
        made: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return made


def _without_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        raise ValueError(f"it names {', '.join(twice)[:100]} twice")
    return made


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not in UTF-8"
    return " ".join(str(error).split())[:300].rstrip(".")
