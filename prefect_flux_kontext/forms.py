"""Types of parameters, with examples for the form that Prefect makes of them.

Annotations are real objects here, as in `flows`.
"""

from typing import Annotated

from pydantic import Field

from prefect_flux_kontext.credentials import FluxKontextCredentials

__all__ = ["Account", "Output", "Prompt"]

Account = Annotated[FluxKontextCredentials | str | None, Field(examples=["my-account"])]
Output = Annotated[str, Field(examples=["s3://my-bucket/restyled", "/data/restyled"])]
Prompt = Annotated[str | None, Field(examples=["Turn it into a loose watercolour"])]
