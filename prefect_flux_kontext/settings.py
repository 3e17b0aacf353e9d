"""Settings from the environment, all named `FLUX_KONTEXT_…`."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.errors import ConfigurationError


class FluxKontextSettings(BaseSettings):
    """What the environment says. Arguments and saved Blocks win over it.

    Raises:
        ConfigurationError: A variable cannot be what it says; all of them are named at once.
    """

    model_config = SettingsConfigDict(
        env_prefix="FLUX_KONTEXT_", extra="ignore", env_ignore_empty=True
    )

    api_key: SecretStr | None = Field(default=None, description="The account's API key.")
    base_url: str = Field(
        default="https://api.apixo.ai", description="Where the service is, without a path."
    )
    account: str = Field(
        default="default", description="A label for the account; it may appear in logs."
    )
    requests_per_minute: int = Field(
        default=10_000, ge=1, description="The account's limit, submits and polls together."
    )
    concurrent_tasks: int = Field(
        default=1_000, ge=1, description="The account's limit of tasks running at once."
    )
    poll_initial_delay: float = Field(
        default=20.0, ge=0, description="Seconds from submit to the first look."
    )
    poll_interval: float = Field(default=3.0, gt=0, description="Seconds between further looks.")
    poll_timeout: float = Field(
        default=900.0, gt=0, description="Seconds to wait for a task before giving up on it."
    )

    concurrent_submits: int = Field(
        default=16, ge=1, description="Submits under way at once: what a crash makes doubtful."
    )
    staging_url: str | None = Field(
        default=None,
        description="Folder or bucket where local reference images are put for the service.",
    )
    staging_public_url: str | None = Field(
        default=None, description="Where that is on the web; without it, URLs are signed."
    )
    price_pro: float = Field(default=0.03, ge=0, description="Dollars for an image in `pro`.")
    price_max: float = Field(default=0.06, ge=0, description="Dollars for an image in `max`.")
    result_days: float = Field(
        default=15.0, gt=0, description="Days for which the service keeps a result."
    )
    storage_options: SecretStr | None = Field(
        default=None,
        description="What the output's filesystem needs to know, as a JSON object.",
    )
    ai_mark: bool = Field(
        default=True, description="Mark images as made by AI, in XMP beside the pixels."
    )

    @field_validator("storage_options")
    @classmethod
    def _options_are_a_json_object(cls, options: SecretStr | None) -> SecretStr | None:
        if options is not None:
            try:
                good = isinstance(json.loads(options.get_secret_value()), dict)
            except (ValueError, RecursionError):
                good = False
            if not good:
                raise ValueError("it is no JSON object")
        return options

    gallery_images: int = Field(
        default=10_000, ge=0, description="Rows that the gallery shows at most; 0 makes none."
    )
    gallery_references: bool = Field(
        default=True, description="Fetch references, to show them as `before` in the gallery."
    )

    callback_url: str | None = Field(
        default=None,
        description="Public URL of the receiver of callbacks. Unset: poll.",
    )
    callback_secret: SecretStr | None = Field(
        default=None, description="What the tokens in callback URLs are made with."
    )
    callback_listen: str | None = Field(
        default=None,
        description="host:port of a receiver in the batch's own process, if any.",
    )
    callback_inbox: str | None = Field(
        default=None, description="Where callbacks are kept. Unset: in the output's own ledger."
    )
    callback_sweep: float = Field(
        default=60.0, gt=0, description="Seconds between looks at a row that is not called back."
    )
    callback_grace: float = Field(
        default=300.0,
        ge=0,
        description="Seconds that a row whose submit's reply was lost waits for its callback.",
    )

    public_urls: dict[str, str] = Field(
        default_factory=dict,
        description="Where a browser finds what is stored, as JSON: output prefix to http(s) URL.",
    )

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            problems = error.errors(include_input=False, include_url=False)
            told = "; ".join(
                f"FLUX_KONTEXT_{str(problem['loc'][0]).upper()}: {problem['msg']}"
                for problem in problems
            )
            raise ConfigurationError(f"The environment is not usable: {told}.") from None

    def prices(self) -> dict[str, float]:
        """Dollars for an image, by mode."""
        return {"pro": self.price_pro, "max": self.price_max}

    def fsspec_options(self) -> dict[str, Any]:
        """What the output's filesystem needs to know; it may be secret."""
        if self.storage_options is None:
            return {}
        return dict(json.loads(self.storage_options.get_secret_value()))

    def required_api_key(self) -> SecretStr:
        """The API key.

        Raises:
            ConfigurationError: FLUX_KONTEXT_API_KEY is not set.
        """
        if self.api_key is None:
            raise ConfigurationError(
                "No API key: set FLUX_KONTEXT_API_KEY. In a flow, a FluxKontextCredentials Block "
                "or the name of a saved one does as well."
            )
        return self.api_key

    def cadence(self) -> PollingCadence:
        """The polling cadence that the environment asks for."""
        try:
            return PollingCadence(
                initial_delay=self.poll_initial_delay,
                interval=self.poll_interval,
                timeout=self.poll_timeout,
            )
        except ValidationError:
            raise ConfigurationError(
                "FLUX_KONTEXT_POLL_TIMEOUT must be longer than FLUX_KONTEXT_POLL_INITIAL_DELAY."
            ) from None
