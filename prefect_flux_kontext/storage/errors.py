"""What a filesystem says when it is not well: whether that passes, and what may be told of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any

_PATIENCE = 60.0
_ATTEMPTS_TO_CONNECT = 4
_BUSY = {408, 429, 500, 502, 503, 504}
_BUSY_WORDS = re.compile(r"SlowDown|ServiceUnavailable|InternalError|TooManyRequests|Throttl")
# Each kind of store has errors of its own for it, and they share no class.
_UNCONNECTED = re.compile(r"Timeout|Timedout|Connect|Payload|IncompleteRead")

# What these options hold is no secret, and helps a person to see what is wrong.
_TELLING = {"endpoint_url", "region_name", "profile", "project", "account_name", "mode"}
_SHORTEST_SECRET = 4


def is_transient(error: Exception, attempts: int, seconds: float) -> bool:
    """Whether a call that has failed with the error is worth another attempt.

    A store that says it is too busy (429, 503 SlowDown and their like) is asked for a minute, and
    one that cannot be reached four times. Every other error is taken as meant.

    Args:
        error: What the filesystem has raised.
        attempts: How often it has failed so far.
        seconds: Since the first attempt began.
    """
    if any(map(_is_busy, _chain(error))):
        return seconds < _PATIENCE
    return attempts < _ATTEMPTS_TO_CONNECT and any(map(_is_unconnected, _chain(error)))


def describe_error(error: BaseException, options: Mapping[str, Any]) -> str:
    """The error in words, without the secrets that the filesystem's options hold."""
    text = f"{type(error).__name__}: {error}"
    for secret in sorted(_secrets(options), key=len, reverse=True):
        text = text.replace(secret, "…")
    return text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_busy(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return True  # what s3fs makes of a 503
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    codes = [metadata.get("HTTPStatusCode")]
    codes += [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return any(code in _BUSY for code in codes if isinstance(code, int)) or bool(
        _BUSY_WORDS.search(str(error))
    )


def _is_unconnected(error: BaseException) -> bool:
    named = any(_UNCONNECTED.search(kind.__name__) for kind in type(error).__mro__)
    return named or isinstance(error, ConnectionError | TimeoutError)


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif name not in _TELLING and isinstance(value, str) and len(value) >= _SHORTEST_SECRET:
            yield value
