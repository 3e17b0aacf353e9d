"""The token in a callback URL: it names an attempt to pay, and only our secret makes one.

The service does not sign its callbacks and names nothing of ours in them, so the URL does both.
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

_SHORTEST_SECRET = 24
_TOKEN = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{32})\.([1-9]\d{0,5})\.([A-Za-z0-9_-]{43})")


class Attempt(NamedTuple):
    """An attempt to pay for a row, as a callback names it.

    Attributes:
        owner: The run that makes it, 16 hexadecimal digits.
        key: The row key, 32 hexadecimal digits.
        number: 1 for the row's first attempt.
    """

    owner: str
    key: str
    number: int


def validate_secret(secret: SecretStr | str | None) -> bytes:
    """The secret that tokens are made with.

    Raises:
        ConfigurationError: There is none, or it is short enough to be guessed.
    """
    given = secret if isinstance(secret, str | None) else secret.get_secret_value()
    plain = (given or "").strip().encode()
    if len(plain) < _SHORTEST_SECRET:
        raise ConfigurationError(
            f"Callbacks need a secret of at least {_SHORTEST_SECRET} characters, the same for the "
            "batch and its receiver. Make one with `openssl rand -hex 32` and set it as "
            "FLUX_KONTEXT_CALLBACK_SECRET or in the Block."
        )
    return plain


def create_token(secret: bytes, attempt: Attempt) -> str:
    """The token of an attempt: what it names, and an HMAC-SHA256 of that; 100 characters or so."""
    named = f"{attempt.owner}.{attempt.key}.{attempt.number}"
    mac = hmac.digest(secret, f"flux-kontext callback {named}".encode(), hashlib.sha256)
    return f"{named}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def parse_token(secret: bytes, token: str) -> Attempt | None:
    """The attempt that a token names, or None where the token was not made with the secret."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    attempt = Attempt(match[1], match[2], int(match[3]))
    genuine = hmac.compare_digest(create_token(secret, attempt).encode(), token.encode())
    return attempt if genuine else None
