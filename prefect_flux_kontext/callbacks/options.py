"""Options of callbacks, from settings and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prefect_flux_kontext.callbacks.tokens import Attempt, create_token, validate_secret
from prefect_flux_kontext.client.addresses import is_loopback_host
from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import SecretStr

    from prefect_flux_kontext.models import GenerationRequest
    from prefect_flux_kontext.settings import FluxKontextSettings


@dataclass(frozen=True, kw_only=True)
class CallbackOptions:
    """How a batch receives callbacks, if at all. Times are in seconds."""

    url: str | None = None  # of the receiver; None to poll
    secret: SecretStr | None = None  # signs the tokens
    listen: tuple[str, int] | None = None  # of a receiver in this process
    inbox: str | None = None  # folder or prefix; None for the one in the output's ledger
    sweep: float = 60.0  # between polls of a row that has had no callback
    grace: float = 300.0  # after a submit without reply or callback, its row is unknown

    def add_url(self, request: GenerationRequest, attempt: Attempt) -> GenerationRequest:
        """Return the request with the callback URL of an attempt, if there is a receiver.

        The URL is a secret: send it in the POST only, never log or store it.
        """
        if self.url is None:
            return request
        url = f"{self.url}/{create_token(validate_secret(self.secret), attempt)}"
        return request.model_copy(update={"callback_url": url, "request_type": "callback"})


def resolve_callback_options(
    settings: FluxKontextSettings,
    *,
    url: str | None = None,
    secret: SecretStr | None = None,
    listens: bool = True,
) -> CallbackOptions:
    """Return the options of the settings, overridden by the arguments, if all are valid."""
    url = url or settings.callback_url
    if url is None:
        return CallbackOptions(inbox=settings.callback_inbox)
    secret = secret or settings.callback_secret
    validate_secret(secret)
    listen = settings.callback_listen if listens else None
    return CallbackOptions(
        url=_validate_url(url),
        secret=secret,
        listen=None if listen is None else _parse_address(listen),
        inbox=settings.callback_inbox,
        sweep=settings.callback_sweep,
        grace=settings.callback_grace,
    )


def _validate_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_local = parts.scheme == "http" and is_loopback_host(parts.hostname)
        secure = parts.scheme == "https" or is_local
        plain = parts.hostname and not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        secure = plain = False
    if not (secure and plain):
        raise ConfigurationError(
            "The callback URL must have the form https://host/path (http only for this machine). "
            "Set FLUX_KONTEXT_CALLBACK_URL to the public URL of the receiver."
        )
    return url.rstrip("/")


def _parse_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        raise ConfigurationError(
            f"The callback address {address!r} must have the form host:port. Set "
            "FLUX_KONTEXT_CALLBACK_LISTEN, for example to 127.0.0.1:8780."
        )
    return host.strip("[]"), int(port)
