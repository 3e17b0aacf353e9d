"""Settings from environment variables, all with the prefix `FLUX_KONTEXT_`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.errors import ConfigurationError

_QUOTED = re.compile(r"^(['\"])(.*)\1$", re.DOTALL)


def find_price(prices: Mapping[str, float], mode: str, provider: str) -> float:
    """Return the price of an image in US dollars: that of the dearest route it may take.

    Prices are by mode, and by mode and route where known (`pro official`); `auto` may take any.
    """
    price = prices[mode]
    official = prices.get(f"{mode} official", price)
    return {"value": price, "official": official, "auto": max(price, official)}[provider]


class FluxKontextSettings(BaseSettings):
    """The settings of the package, read from the environment.

    Arguments and saved Blocks take precedence over the environment. An empty variable counts
    as unset.

    Raises:
        ConfigurationError: One or more variables are invalid. The message names all of them,
            without their values.
    """

    model_config = SettingsConfigDict(
        env_prefix="FLUX_KONTEXT_",
        extra="ignore",
        env_ignore_empty=True,
        use_attribute_docstrings=True,
    )

    api_key: SecretStr | None = None
    """API key of the account."""
    base_url: str = "https://api.apixo.ai"
    """Base URL of the service, in the form `https://host[:port]`. The path `/api/v1` may
    follow."""
    account: str = "default"
    """Label of the account. It may appear in logs."""
    requests_per_minute: int = Field(default=10_000, ge=1)
    """Request limit of the account, in requests per minute. Submits and status requests count
    together."""
    concurrent_tasks: int = Field(default=1_000, ge=1)
    """Concurrency limit of the account: tasks that may run at the same time."""
    poll_initial_delay: float = Field(default=20.0, ge=0)
    """Seconds from the submit to the first status request."""
    poll_interval: float = Field(default=3.0, gt=0)
    """Seconds between later status requests for a task."""
    poll_timeout: float = Field(default=900.0, gt=0)
    """Seconds to wait for a task. A task that is still running then stays outstanding and can be
    collected later."""

    concurrent_submits: int = Field(default=16, ge=1)
    """Maximum number of submits in flight. A crash leaves at most this many rows unknown."""
    outage_timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds for which submitting pauses while the service gives no usable replies. After that
    the batch stops."""
    stop_timeout: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    """Seconds for which a run that is stopped waits for replies to submits under way. Rows without
    a reply stay unknown."""
    heartbeat: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """Seconds between two heartbeats of a run. A run on another machine counts as dead after four
    missed ones."""
    ledger: str | None = None
    """Folder with the ledger of the tasks `submit_generation`, `wait_for_generation` and
    `persist_images`. Unset: they keep none."""
    staging_url: str | None = None
    """Folder or bucket to which local reference images are copied, so that the service can fetch
    them."""
    staging_public_url: str | None = None
    """Public URL of the staging folder. Unset: staged images get signed URLs."""
    reference_roots: list[str] | None = None
    """Folders and bucket prefixes below which reference images must be, as a JSON list. References
    on the web are not affected. Unset: a local manifest may name all, a folder of images what is
    in it, a remote manifest its own bucket."""
    match_references: bool = True
    """Read the headers of reference images on the web, to send the aspect ratio nearest to theirs
    where it is `match`. Off: 16:9 is sent."""
    price_pro: float = Field(default=0.03, ge=0)
    """Price of an image in mode `pro`, in US dollars."""
    price_pro_official: float | None = Field(default=None, ge=0)
    """Likewise on the official route, which provider `auto` may take."""
    price_max: float = Field(default=0.06, ge=0)
    """Price of an image in mode `max`, in US dollars."""
    price_max_official: float | None = Field(default=None, ge=0)
    """Likewise on the official route, which provider `auto` may take."""
    result_days: float = Field(default=15.0, gt=0)
    """Days for which the service keeps a result. Outstanding rows whose results expire soon are
    reported."""
    storage_options: SecretStr | None = None
    """Options of the output's fsspec filesystem, such as keys and endpoints, as a JSON object."""
    ai_mark: bool = True
    """Mark stored images as made by AI, in XMP metadata. The pixels do not change."""

    gallery_images: int = Field(default=10_000, ge=0)
    """Maximum number of rows in the HTML gallery. 0: no gallery."""
    gallery_references: bool = True
    """Fetch the reference images and show each one as `before` in the gallery."""

    callback_url: str | None = None
    """Public URL of the callback receiver. Unset: completion is found by polling."""
    callback_secret: SecretStr | None = None
    """Secret that signs the tokens in callback URLs. Batches and their receiver need the same
    value."""
    callback_listen: str | None = None
    """Address (`host:port`) on which the batch itself receives callbacks. Unset: a separate
    receiver is expected."""
    callback_inbox: str | None = None
    """Folder in which receivers store callbacks. Unset: the output's own ledger."""
    callback_sweep: float = Field(default=60.0, gt=0)
    """Seconds between status requests for a task whose callback has not arrived."""
    callback_grace: float = Field(default=300.0, ge=0)
    """Seconds to wait for a callback after the reply to a submit was lost, before the row is
    reported as unknown."""

    secret_parameters: str = ""
    """Further query parameters that sign URLs, separated by commas. Like those of the known
    stores, they are removed from every URL that is shown or stored."""

    public_urls: dict[str, str] = Field(default_factory=dict)
    """Public URLs of outputs, as a JSON object that maps an output prefix to an http(s) URL.
    Prefect artifacts use them as links."""
    asset_owners: list[str] = Field(default_factory=list)
    """Who owns the outputs, as a JSON list. The assets in Prefect name them."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"FLUX_KONTEXT_{str(problem['loc'][0]).upper()}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_url=False)
            )
            # `from None`: the ValidationError holds the values, and so possibly secrets.
            raise ConfigurationError(f"Invalid environment variables: {problems}.") from None

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Remove white space and quotes, which files of variables leave around values."""
        stripped = {
            name: _QUOTED.sub(r"\2", value.strip()) if isinstance(value, str) else value
            for name, value in values.items()
        }
        return {name: value for name, value in stripped.items() if value != ""}

    @field_validator("storage_options")
    @classmethod
    def _validate_storage_options(cls, options: SecretStr | None) -> SecretStr | None:
        if options is not None:
            try:
                is_object = isinstance(json.loads(options.get_secret_value()), dict)
            except (ValueError, RecursionError):
                is_object = False
            if not is_object:
                raise ValueError("must be a JSON object")
        return options

    def prices(self) -> dict[str, float]:
        """Return the price of an image by mode, in US dollars; see `find_price`."""
        prices = {
            "pro": self.price_pro,
            "max": self.price_max,
            "pro official": self.price_pro_official,
            "max official": self.price_max_official,
        }
        return {name: price for name, price in prices.items() if price is not None}

    def fsspec_options(self) -> dict[str, Any]:
        """Return the options of the output's filesystem. They may hold secrets."""
        if self.storage_options is None:
            return {}
        return dict(json.loads(self.storage_options.get_secret_value()))

    def require_api_key(self) -> SecretStr:
        """Return the API key.

        Raises:
            ConfigurationError: FLUX_KONTEXT_API_KEY is not set.
        """
        if self.api_key is None:
            raise ConfigurationError(
                "No API key: set FLUX_KONTEXT_API_KEY. In a flow, you can also pass a "
                "FluxKontextCredentials Block or the name of a saved one."
            )
        return self.api_key

    def cadence(self) -> PollingCadence:
        """Return the polling cadence of these settings.

        Raises:
            ConfigurationError: The timeout is not longer than the initial delay.
        """
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
