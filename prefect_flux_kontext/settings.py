"""Settings from the environment, all named `FLUX_KONTEXT_…`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefect_flux_kontext.api.cadence import PollingCadence
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
    price_pro: float = Field(default=0.03, ge=0, description="Dollars for an image in `pro`.")
    price_max: float = Field(default=0.06, ge=0, description="Dollars for an image in `max`.")
    result_days: float = Field(
        default=15.0, gt=0, description="Days for which the service keeps a result."
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
