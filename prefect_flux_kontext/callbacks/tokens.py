"""Tokens in callback URLs: each names an attempt and is signed with the secret.

The service neither signs its callbacks nor names the row in them, so the URL does both.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from typing import TYPE_CHECKING, NamedTuple

from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import SecretStr

_MIN_SECRET_CHARACTERS = 24
"""Too long to guess, also for a secret of lower-case letters only."""

_MIN_DIFFERENT_CHARACTERS = 8
"""Far fewer than a random secret has, also in hexadecimal digits."""

_TOKEN = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{32})\.([1-9]\d{0,5})\.([A-Za-z0-9_-]{43})")


class Attempt(NamedTuple):
    """A paid try of a row, as a callback names it: run, row key and number from 1."""

    owner: str
    key: str
    number: int


def validate_secret(secret: SecretStr | str | None) -> bytes:
    """Return the secret as bytes, without surrounding white space.

    Raises:
        ConfigurationError: The secret is missing, too short or too uniform.
    """
    value = secret if isinstance(secret, str | None) else secret.get_secret_value()
    plain = (value or "").strip().encode()
    if len(plain) < _MIN_SECRET_CHARACTERS or len(set(plain)) < _MIN_DIFFERENT_CHARACTERS:
        raise ConfigurationError(
            f"Callbacks need a secret of at least {_MIN_SECRET_CHARACTERS} characters, "
            f"{_MIN_DIFFERENT_CHARACTERS} of them different, the same for the batch and its "
            "receiver. Create one with `openssl rand -hex 32` and set it as "
            "FLUX_KONTEXT_CALLBACK_SECRET or in the Block."
        )
    return plain


def create_token(secret: bytes, attempt: Attempt) -> str:
    """Return the token of an attempt: its fields and their HMAC-SHA256, about 100 characters."""
    fields = f"{attempt.owner}.{attempt.key}.{attempt.number}"
    mac = hmac.digest(secret, f"flux-kontext callback {fields}".encode(), hashlib.sha256)
    return f"{fields}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def parse_token(secret: bytes, token: str) -> Attempt | None:
    """Return the attempt that a token names, or None if the secret did not sign the token."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    attempt = Attempt(match[1], match[2], int(match[3]))
    genuine = hmac.compare_digest(create_token(secret, attempt).encode(), token.encode())
    return attempt if genuine else None
