"""A style: a name for a prompt and its parameters, to be used on many images."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prefect_flux_kontext.models import (
    AspectRatio,
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
)
from prefect_flux_kontext.names import problem_of_text
from prefect_flux_kontext.styles.templates import Template, template

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        problem = problem_of_text(name)
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
        template(prompt)
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
        return template(self.prompt)

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
