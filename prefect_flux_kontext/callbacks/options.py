"""What a person decides about callbacks."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prefect_flux_kontext.callbacks.tokens import validate_secret
from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import SecretStr

    from prefect_flux_kontext.settings import FluxKontextSettings


@dataclass(frozen=True, kw_only=True)
class CallbackOptions:
    """How a batch is called back.

    Attributes:
        url: Public URL of the receiver, to which tokens are added; None to poll.
        secret: What tokens are made with; at least 24 characters where there is a URL.
        listen: Host and port of a receiver in the batch's own process; None where one runs
            elsewhere.
        inbox: Folder or prefix where callbacks are kept; None for the output's own.
        sweep: Seconds after which a row is looked at without a callback, again and again.
        grace: Seconds from its submit for which a row whose reply was lost waits for its callback
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
    """What the settings say, unless an argument or a Block says otherwise.

    Args:
        settings: The environment's.
        url: Public URL of the receiver.
        secret: What tokens are made with.
        listens: Whether a receiver may be started in this process.

    Raises:
        ConfigurationError: The URL, the secret or the address cannot be right.
    """
    url = url or settings.callback_url
    if url is None:
        return CallbackOptions(inbox=settings.callback_inbox)
    secret = secret or settings.callback_secret
    validate_secret(secret)
    listen = settings.callback_listen if listens else None
    return CallbackOptions(
        url=_checked_url(url),
        secret=secret,
        listen=None if listen is None else _host_and_port(listen),
        inbox=settings.callback_inbox,
        sweep=settings.callback_sweep,
        grace=settings.callback_grace,
    )


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https" or (parts.scheme == "http" and _is_here(parts.hostname))
        plain = parts.hostname and not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        secure = plain = False
    if not (secure and plain):
        raise ConfigurationError(
            "The callback URL is not of the form https://host/path (http only to this machine). "
            "Set FLUX_KONTEXT_CALLBACK_URL to where the service reaches the receiver."
        )
    return url.rstrip("/")


def _is_here(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        raise ConfigurationError(
            f"The address {address!r} to receive callbacks on is not of the form host:port. Set "
            "FLUX_KONTEXT_CALLBACK_LISTEN, for example to 127.0.0.1:8780."
        )
    return host.strip("[]"), int(port)
