"""The two things a client is made of, checked before they are used."""

from __future__ import annotations

import httpx
from pydantic import SecretStr

from prefect_flux_kontext.errors import ConfigurationError


def checked_key(api_key: str | SecretStr) -> str:
    """The key without the white space that files and shells leave around it.

    Raises:
        ConfigurationError: It is empty, or cannot stand in a header.
    """
    key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "The API key is empty or has characters that no key has. Set FLUX_KONTEXT_API_KEY "
            "or the Block's api_key."
        )
    return key


def checked_base_url(base_url: str) -> str:
    """The base URL without a slash at its end.

    Raises:
        ConfigurationError: It is not of the form https://host[:port].
    """
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if (
        url.scheme not in ("http", "https")
        or not url.host
        or url.userinfo
        or url.query
        or url.fragment
    ):
        without_password = base_url.rpartition("@")[2]
        raise ConfigurationError(
            f"The base URL {without_password!r} is not of the form https://host[:port]. Set "
            "FLUX_KONTEXT_BASE_URL or the Block's base_url."
        )
    return base_url.rstrip("/")
