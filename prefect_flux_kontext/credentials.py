"""The credentials Block, and where credentials come from."""

from __future__ import annotations

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.system import Secret
from pydantic import ConfigDict, Field, SecretStr

from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.settings import FluxKontextSettings

_SLUG = "flux-kontext-credentials"


class FluxKontextCredentials(CredentialsBlock):
    """An account of the Flux Kontext image API: its key, its address and its limits.

    What is left out comes from the environment (`FLUX_KONTEXT_…`) at the moment the Block is
    made, else from the defaults. A saved Block keeps what it was saved with.

    Example:
        Load a saved account and ask for its balance:
        ```python
        from prefect_flux_kontext import FluxKontextCredentials

        credentials = FluxKontextCredentials.load("BLOCK_NAME")

        async with credentials.get_client() as client:
            print(await client.balance())
        ```
    """

    _block_type_name = "Flux Kontext Credentials"
    _block_type_slug = _SLUG
    _logo_url = Secret._logo_url  # noqa: SLF001 - Prefect draws it for keys
    _documentation_url = "https://apixo.ai/docs/models/image/flux-kontext"  # type: ignore[assignment]

    model_config = ConfigDict(extra="forbid")

    api_key: SecretStr = Field(description="The account's API key.")
    base_url: str = Field(
        default_factory=lambda: FluxKontextSettings().base_url,
        description="Where the service is, without a path. Unset: FLUX_KONTEXT_BASE_URL, else "
        "https://api.apixo.ai.",
    )
    account: str = Field(
        default_factory=lambda: FluxKontextSettings().account,
        description="A label for the account, shown in logs. Unset: FLUX_KONTEXT_ACCOUNT, else "
        "'default'.",
    )
    requests_per_minute: int = Field(
        default_factory=lambda: FluxKontextSettings().requests_per_minute,
        ge=1,
        description="The account's limit of requests, submits and polls together. Unset: "
        "FLUX_KONTEXT_REQUESTS_PER_MINUTE, else 10,000.",
    )
    concurrent_tasks: int = Field(
        default_factory=lambda: FluxKontextSettings().concurrent_tasks,
        ge=1,
        description="The account's limit of tasks running at once. Unset: "
        "FLUX_KONTEXT_CONCURRENT_TASKS, else 1,000.",
    )

    callback_secret: SecretStr | None = Field(
        default_factory=lambda: FluxKontextSettings().callback_secret,
        description="What the tokens in callback URLs are made with, the same for batches and "
        "their receiver. Unset: FLUX_KONTEXT_CALLBACK_SECRET.",
    )

    def get_client(self) -> FluxKontextClient:
        """A new client for the account, for the event loop it is used on.

        Raises:
            ConfigurationError: The key or the base URL cannot be right.
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
    """The account meant by a Block, by the name of a saved Block, or by the environment.

    Raises:
        ConfigurationError: There is no valid Block of that name, or the environment has no key.
    """
    if isinstance(credentials, FluxKontextCredentials):
        return credentials
    if credentials is not None:
        name = credentials.removeprefix(f"{_SLUG}/")
        try:
            return await FluxKontextCredentials.aload(name)
        # Prefect's RuntimeError: it was saved with fields that are not valid any more.
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(f"No saved Block {_SLUG}/{name}: {error}") from None
    return FluxKontextCredentials(api_key=FluxKontextSettings().required_api_key())
