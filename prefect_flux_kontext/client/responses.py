"""Parsers of the service's replies: pure functions without I/O.

An error may arrive as an HTTP status, or as HTTP 200 with another `code` in the envelope; both
mean the same. The parsers accept fields that are missing, null or of another type.
"""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import Any

from prefect_flux_kontext.errors import (
    ApiError,
    ForbiddenError,
    InsufficientBalanceError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    RefusedError,
    ServiceTroubleError,
    UnauthorizedError,
    UnreadableReplyError,
)
from prefect_flux_kontext.models import TaskStatus

__all__ = [
    "read_balance",
    "read_callback",
    "read_envelope",
    "read_status",
    "read_task_id",
]

_MAX_TASK_ID_CHARACTERS = 200
_MAX_TEXT_CHARACTERS = 500
_MAX_EXCERPT_CHARACTERS = 80
_MAX_RESULT_URLS = 100
_SUCCESS = range(200, 300)
_RATE_LIMITED = 429

# The signature in a signed URL. A reply's message may repeat the URL of a reference image, which
# every reader of the message could fetch with its signature.
_URL_SIGNATURE = re.compile(
    r"(?:[?&]|%3f|%26)(?:x-amz-|x-goog-|awsaccesskeyid=|googleaccessid=|signature=|sig=|sv=)"
    r"[^\s\"'<>]*",
    re.IGNORECASE,
)

_REFUSALS: dict[int, tuple[type[RefusedError], str]] = {
    400: (InvalidRequestError, "Correct the request. Nothing was billed."),
    401: (UnauthorizedError, "Check the API key: FLUX_KONTEXT_API_KEY or the Block's api_key."),
    402: (InsufficientBalanceError, "Top up the account, then run again."),
    403: (ForbiddenError, "The account lacks permission, or the content policy forbids it."),
    404: (NotFoundError, "No such task or model. Check FLUX_KONTEXT_BASE_URL and the task id."),
}


def read_envelope(
    status: int,
    body: bytes,
    *,
    retry_after: float | None = None,
    task_id: str | None = None,
    secret: str = "",
) -> Any:
    """Return the `data` of a successful reply, or raise the error that the reply reports.

    Args:
        status: The HTTP status.
        body: The complete body.
        retry_after: Seconds from the `Retry-After` header.
        task_id: The task that the request was about. None for a submit.
        secret: Text that error messages must not contain, such as the API key.

    Raises:
        ApiError: The subclass for the error code, which is the HTTP status, or if that is 2xx,
            the envelope's code.
    """
    envelope = _as_dict(_parse_json(body))
    data = envelope.get("data")
    code = _as_int(envelope.get("code"), default=status) if status in _SUCCESS else status
    if code in _SUCCESS and envelope:
        return data
    if task_id is None and (named := _find_task_id(data)):
        raise UnreadableReplyError(
            f"The reply has error code {code} but names task {named}, so the task may have been "
            "accepted and billed.",
            task_id=named,
            code=code,
        )
    if not 400 <= code <= 599:  # noqa: PLR2004 - the range of HTTP errors
        raise UnreadableReplyError(
            f"The reply (HTTP {status}) is not in the service's format: {_excerpt(body, secret)}",
            task_id=task_id,
            code=None if code in _SUCCESS else code,
        )
    raise _create_error(code, _read_message(envelope, body, secret), retry_after, task_id)


def read_task_id(data: Any, *, secret: str = "") -> str:
    """Return the `taskId` of an accepted submit.

    Raises:
        UnreadableReplyError: The data has no usable task id. The submit may still have been
            accepted.
    """
    task_id = _find_task_id(data)
    if not task_id:
        raise UnreadableReplyError(
            "The service answered 200 without a usable taskId, so the task may have been "
            f"accepted and billed. Its data: {_printable(data, secret)}"
        )
    return task_id


def read_status(data: Any, *, task_id: str, secret: str = "") -> TaskStatus:
    """Return the status in a reply's `data`.

    Raises:
        UnreadableReplyError: The data is about another task, has no state, or reports `success`
            with no result URL or more than 100. A later request may succeed.
    """
    data = _as_dict(data)
    reported_id = data.get("taskId")
    if reported_id is not None and _printable(reported_id) != task_id:
        shown = _printable(reported_id, secret)[:_MAX_EXCERPT_CHARACTERS]
        raise UnreadableReplyError(
            f"The status reply for task {task_id} is about task {shown!r}.", task_id=task_id
        )
    state = data.get("state")
    if not isinstance(state, str) or not _clean(state):
        raise UnreadableReplyError("The status reply has no state.", task_id=task_id)
    result_urls = _find_result_urls(data.get("resultJson")) if state == "success" else []
    if state == "success" and not result_urls:
        raise UnreadableReplyError(
            "The task succeeded, but its resultJson contains no result URL.", task_id=task_id
        )
    if len(result_urls) > _MAX_RESULT_URLS:
        raise UnreadableReplyError(
            f"The task succeeded with {len(result_urls):,} result URLs. At most "
            f"{_MAX_RESULT_URLS} are accepted.",
            task_id=task_id,
        )
    return TaskStatus(
        task_id=task_id,
        state=_clean(state),
        result_urls=result_urls,
        fail_code=_printable(data.get("failCode"), secret) or None,
        fail_message=_printable(data.get("failMsg"), secret) or None,
        created_at=_as_moment(data.get("createTime")),
        completed_at=_as_moment(data.get("completeTime")),
        generation_seconds=_as_seconds(data.get("costTime")),
    )


def read_callback(body: bytes) -> str | None:
    """Return the id of the task that a callback is about, or None if it names none.

    The rest of the callback is ignored; the status request decides.
    """
    envelope = _as_dict(_parse_json(body))
    return _find_task_id(envelope.get("data")) or _find_task_id(envelope) or None


def read_balance(data: Any, *, secret: str = "") -> float:
    """Return the balance in US dollars from a balance reply in any of the likely shapes.

    Raises:
        UnreadableReplyError: The reply contains no number.
    """
    names = ("balance", "currentBalance", "current_balance", "amount")
    values = [data.get(name) for name in names] if isinstance(data, dict) else [data]
    for value in values:
        try:
            dollars = float(value)  # type: ignore[arg-type] # float() rejects other types
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(dollars):
            return dollars
    raise UnreadableReplyError(f"The balance reply contains no number: {_printable(data, secret)}")


def _find_result_urls(value: Any) -> list[str]:
    if isinstance(value, str):
        value = _parse_json(value)
    urls = value.get("resultUrls") if isinstance(value, dict) else value
    if not isinstance(urls, list):
        return []
    # A URL with unprintable characters (controls, lone surrogates) cannot be fetched.
    return [url for url in urls if isinstance(url, str) and url and url.isprintable()]


def _find_task_id(data: Any) -> str:
    """Return the `taskId` in a submit's `data`, or an empty string if none is usable."""
    value = _as_dict(data).get("taskId")
    task_id = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    is_usable = task_id.isprintable() and 0 < len(task_id.strip()) <= _MAX_TASK_ID_CHARACTERS
    return task_id if is_usable else ""


def _parse_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_int(value: Any, default: Any = None) -> Any:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _as_seconds(milliseconds: Any) -> float | None:
    try:
        return float(_as_int(milliseconds)) / 1000
    except (TypeError, OverflowError):
        return None


def _as_moment(milliseconds: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(_as_int(milliseconds) / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _create_error(
    code: int, message: str, retry_after: float | None, task_id: str | None
) -> ApiError:
    if code == _RATE_LIMITED:
        return RateLimitedError(
            f"429: {message}. A limit of the account was exceeded.",
            task_id=task_id,
            retry_after=retry_after,
        )
    if code >= 500:  # noqa: PLR2004
        return ServiceTroubleError(f"{code}: {message}.", task_id=task_id, code=code)
    kind, advice = _REFUSALS.get(code, (RefusedError, "The service refused the request."))
    return kind(f"{code}: {message}. {advice}", task_id=task_id, code=code)


def _read_message(envelope: dict[str, Any], body: bytes, secret: str) -> str:
    """Return the messages of an error reply, or the beginning of its body if it has none."""
    error = _as_dict(envelope.get("data")).get("error")
    values = (envelope.get("message"), envelope.get("msg"), error)
    message = ": ".join(dict.fromkeys(_printable(value, secret) for value in values if value))
    return message.rstrip(".") or _excerpt(body, secret)


def _excerpt(body: bytes, secret: str) -> str:
    # Read more than is shown, so that a secret at the cut is recognised.
    text = body[: _MAX_EXCERPT_CHARACTERS + len(secret)].decode(errors="replace")
    return _printable(text, secret)[:_MAX_EXCERPT_CHARACTERS] or "an empty body"


def _printable(value: Any, secret: str = "") -> str:
    """Return a value of a reply as text that can be shown, without secrets. Empty for None."""
    text = "" if value is None else _URL_SIGNATURE.sub("…", str(value))
    # Replace the secret before the text is cut, so that no part of it is left at the end.
    return _clean(text.replace(secret, "***") if secret else text)


def _clean(text: str) -> str:
    """Return text on one line, without control characters, of at most 500 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[
        :_MAX_TEXT_CHARACTERS
    ]
