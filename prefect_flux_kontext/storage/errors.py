"""Errors of filesystems: which ones are transient, and how to describe them without secrets."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any

# How long calls to a busy store are repeated.
_BUSY_RETRY_SECONDS = 60.0

_MAX_CONNECT_ATTEMPTS = 4

# 409 is what S3 answers to one of two conditional writes that meet.
_BUSY_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
_BUSY_WORDS = re.compile(
    r"SlowDown|ServiceUnavailable|InternalError|TooManyRequests|Throttl|ConditionalRequestConflict"
)

_NOT_IMPLEMENTED_STATUS = 501
_PRECONDITION_FAILED_STATUS = 412

# Each store has its own connection errors, which share no class. They are matched by class name.
_CONNECTION_ERROR_NAMES = re.compile(r"Timeout|Timedout|Connect|Payload|IncompleteRead")

# The values of these options are not secret, and help to find the cause of an error.
_PUBLIC_OPTIONS = {"endpoint_url", "region_name", "profile", "project", "account_name", "mode"}

# Shorter values, such as "us", would blank out parts of ordinary words.
_MIN_SECRET_LENGTH = 4


def is_transient(error: Exception, attempts: int, seconds: float) -> bool:
    """Whether a failed call is worth another attempt.

    Calls to a busy store (409, 429, 503 SlowDown and similar) are repeated for a minute, and calls
    to a store that cannot be reached four times. All other errors are permanent.
    """
    if any(map(_is_busy, _error_chain(error))):
        return seconds < _BUSY_RETRY_SECONDS
    return attempts < _MAX_CONNECT_ATTEMPTS and any(map(_is_connection_error, _error_chain(error)))


def is_unsupported(error: Exception) -> bool:
    """Whether the store does not have the operation, so that repeating the call is in vain."""
    return any(
        isinstance(each, NotImplementedError)
        or (isinstance(each, OSError) and each.errno == errno.ENOSYS)
        or _NOT_IMPLEMENTED_STATUS in _find_statuses(each)
        for each in _error_chain(error)
    )


def is_precondition_failure(error: Exception) -> bool:
    """Whether a conditional write was refused (412): the file exists."""
    return any(_PRECONDITION_FAILED_STATUS in _find_statuses(each) for each in _error_chain(error))


def describe_error(error: BaseException, options: Mapping[str, Any]) -> str:
    """Describe an error without the secrets in the filesystem's options."""
    text = f"{type(error).__name__}: {error}"
    for secret in sorted(_find_secrets(options), key=len, reverse=True):
        text = text.replace(secret, "…")
    return text


def _error_chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_busy(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return True  # s3fs turns a 503 into this
    return not _BUSY_STATUSES.isdisjoint(_find_statuses(error)) or bool(
        _BUSY_WORDS.search(str(error))
    )


def _find_statuses(error: BaseException) -> set[int]:
    """Return the HTTP status of an error; each store keeps it in another place."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    codes = [metadata.get("HTTPStatusCode")]
    codes += [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return {code for code in codes if isinstance(code, int)}


def _is_connection_error(error: BaseException) -> bool:
    has_name = any(_CONNECTION_ERROR_NAMES.search(kind.__name__) for kind in type(error).__mro__)
    return has_name or isinstance(error, ConnectionError | TimeoutError)


def _find_secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _find_secrets(value)
        elif (
            name not in _PUBLIC_OPTIONS
            and isinstance(value, str)
            and len(value) >= _MIN_SECRET_LENGTH
        ):
            yield value
