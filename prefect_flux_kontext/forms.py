"""Types of parameters, with examples for the form that Prefect makes of them.

Annotations are real objects here, as in `flows`.
"""

from typing import Annotated

from pydantic import Field

from prefect_flux_kontext.credentials import FluxKontextCredentials

__all__ = ["Account", "Prompt", "StyleNames"]

Account = Annotated[FluxKontextCredentials | str | None, Field(examples=["my-account"])]
Prompt = Annotated[str | None, Field(examples=["Turn it into a loose watercolour"])]
StyleNames = Annotated[str | list[str] | None, Field(examples=[["watercolour", "my-styles.yaml"]])]
