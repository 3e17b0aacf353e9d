"""Options of callbacks, from settings and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prefect_flux_kontext.addresses import is_loopback_host
from prefect_flux_kontext.callbacks.tokens import validate_secret
from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import SecretStr

    from prefect_flux_kontext.settings import FluxKontextSettings


@dataclass(frozen=True, kw_only=True)
class CallbackOptions:
    """How a batch receives callbacks.

    Attributes:
        url: Public URL of the receiver, to which tokens are added; None to poll.
        secret: Secret that signs the tokens; at least 24 characters if there is a URL.
        listen: Host and port of a receiver in the batch's own process; None if the receiver runs
            elsewhere.
        inbox: Folder or prefix where callbacks are stored; None for the one in the output's
            ledger.
        sweep: Seconds between polls of a row that has had no callback.
        grace: Seconds, from the submit on, for which a row without a reply waits for its callback
            before it is reported as unknown.
    """

    url: str | None = None
    secret: SecretStr | None = None
    listen: tuple[str, int] | None = None
    inbox: str | None = None
    sweep: float = 60.0
    grace: float = 300.0


def resolve_callback_options(
    settings: FluxKontextSettings,
    *,
    url: str | None = None,
    secret: SecretStr | None = None,
    listens: bool = True,
) -> CallbackOptions:
    """Return the options of the settings, overridden by the arguments.

    Args:
        settings: The settings of the environment.
        url: Public URL of the receiver.
        secret: Secret that signs the tokens.
        listens: Whether a receiver may be started in this process.

    Raises:
        ConfigurationError: The URL, the secret or the address is invalid.
    """
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
