"""The credentials Block, and how credentials are resolved."""

from __future__ import annotations

from typing import Any

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.system import Secret
from pydantic import ConfigDict, Field, SecretStr, model_validator

from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.settings import FluxKontextSettings

__all__ = ["FluxKontextCredentials", "resolve_credentials"]

_SLUG = "flux-kontext-credentials"


class FluxKontextCredentials(CredentialsBlock):
    """An account of the Flux Kontext image API: key, base URL and limits.

    A field that is not given is read from the environment (`FLUX_KONTEXT_…`) when the Block is
    created, else it has its default. A saved Block keeps the values it was saved with.

    Example:
        Load a saved account and read its balance:
        ```python
        from prefect_flux_kontext import FluxKontextCredentials

        credentials = FluxKontextCredentials.load("BLOCK_NAME")

        async with credentials.get_client() as client:
            print(await client.balance())
        ```
    """

    _block_type_name = "Flux Kontext Credentials"
    _block_type_slug = _SLUG
    _logo_url = Secret._logo_url  # noqa: SLF001 - the logo of Prefect's own Secret Block
    _documentation_url = "https://apixo.ai/docs/models/image/flux-kontext"  # type: ignore[assignment]

    model_config = ConfigDict(extra="forbid")

    api_key: SecretStr = Field(title="API key", description="API key of the account.")
    base_url: str = Field(
        title="Base URL",
        default_factory=lambda: FluxKontextSettings().base_url,
        description="Base URL of the service, in the form https://host[:port]. Unset: "
        "FLUX_KONTEXT_BASE_URL, else https://api.apixo.ai.",
    )
    account: str = Field(
        default_factory=lambda: FluxKontextSettings().account,
        description="Label of the account. It may appear in logs. Unset: FLUX_KONTEXT_ACCOUNT, "
        "else 'default'.",
    )
    requests_per_minute: int = Field(
        title="Requests per minute",
        default_factory=lambda: FluxKontextSettings().requests_per_minute,
        ge=1,
        description="Request limit of the account, in requests per minute. Submits and status "
        "requests count together. Unset: FLUX_KONTEXT_REQUESTS_PER_MINUTE, else 10,000.",
    )
    concurrent_tasks: int = Field(
        title="Concurrent tasks",
        default_factory=lambda: FluxKontextSettings().concurrent_tasks,
        ge=1,
        description="Concurrency limit of the account: tasks that may run at the same time. "
        "Unset: FLUX_KONTEXT_CONCURRENT_TASKS, else 1,000.",
    )
    callback_secret: SecretStr | None = Field(
        title="Callback secret",
        default_factory=lambda: FluxKontextSettings().callback_secret,
        description="Secret that signs the tokens in callback URLs. Batches and their receiver "
        "need the same value. Unset: FLUX_KONTEXT_CALLBACK_SECRET.",
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_type(cls, fields: Any) -> Any:
        # Prefect adds the type to the fields of a Block that is saved inside another one.
        if isinstance(fields, dict) and fields.get("block_type_slug") == _SLUG:
            return {name: fields[name] for name in fields if name != "block_type_slug"}
        return fields

    def get_client(self) -> FluxKontextClient:
        """Create a client for the account. Use each client on one event loop only.

        Raises:
            ConfigurationError: The key or the base URL is invalid.
        """
        return FluxKontextClient(
            self.api_key,
            base_url=self.base_url,
            requests_per_minute=self.requests_per_minute,
            concurrent_tasks=self.concurrent_tasks,
        )


async def resolve_credentials(
    credentials: FluxKontextCredentials | str | None,
) -> FluxKontextCredentials:
    """Return the credentials of a Block, of the saved Block of a name, or of the environment.

    Args:
        credentials: A Block, the name of a saved Block (with or without its type), or None for
            the environment.

    Raises:
        ConfigurationError: No valid Block has that name, or FLUX_KONTEXT_API_KEY is not set.
    """
    if isinstance(credentials, FluxKontextCredentials):
        return credentials
    if credentials is not None:
        name = credentials.removeprefix(f"{_SLUG}/")
        try:
            return await FluxKontextCredentials.aload(name)
        # Prefect raises RuntimeError for a Block that was saved with fields now invalid.
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(f"No saved Block {_SLUG}/{name}: {error}") from None
    return FluxKontextCredentials(api_key=FluxKontextSettings().require_api_key())
