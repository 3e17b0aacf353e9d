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

# Advice that is also right for a status request, whose task is paid for.
_STATUS_ADVICE = (401, 402, 404)

# A refusal may name its reason as a failed task does: `SensitiveContentDetected`, `NSFW_DETECTED`.
_FAIL_CODE = re.compile(r"NSFW|(?=\w*(?:_|[a-z][A-Z]))[A-Z][A-Za-z_]{3,60}")
_BALANCE_CODES = {"insufficientcredits", "insufficientbalance"}

# The contract's words are `success` and `failed`; the others are those of like services. A success
# counts only with a result URL, and the words in the last set only with a fail code.
_SUCCESS_STATES = {"success", "succeeded", "successful", "completed", "complete", "done", "ready"}
_FAILED_STATES = {"failed", "fail", "failure"}
_MAYBE_FAILED_STATES = {"error", "cancelled", "canceled", "rejected", "timeout"}

# Where a status may have its results, and where these may have their URLs.
_RESULT_NAMES = (
    "resultJson",
    "resultUrls",
    "resultUrl",
    "response",
    "result",
    "results",
    "output",
)
_URL_NAMES = (*_RESULT_NAMES, "result_urls", "urls", "url", "images", "image", "outputs")
_MAX_RESULT_DEPTH = 6
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S")
_BETWEEN_URLS = re.compile(r"[\s,;]+(?=https?://)")


def read_envelope(
    status: int,
    body: bytes,
    *,
    retry_after: float | None = None,
    task_id: str | None = None,
    secret: str = "",
) -> Any:
    """Return the `data` of a successful reply, or raise the error that the reply reports.

    A submit has no `task_id`. Error messages do not contain the `secret`, such as the API key.

    Raises:
        UnreadableReplyError: The reply does not follow the contract. For a status request, that
            is also a 4xx without an envelope: a page of a gateway says nothing about the task.
        ApiError: The subclass for the error code, which is the HTTP status, or if that is 2xx,
            the envelope's code.
    """
    envelope = _as_dict(_parse_json(body))
    data = envelope.get("data")
    code = _as_int(envelope.get("code"), default=status) if status in _SUCCESS else status
    if code in _SUCCESS and envelope:
        return data
    is_page = task_id is not None and not envelope and code != _RATE_LIMITED
    if is_page and 400 <= code < 500:  # noqa: PLR2004 - a refusal
        raise UnreadableReplyError(
            f"The status request was answered with HTTP {status}, but not by the service: "
            f"{_excerpt(body, secret)}",
            task_id=task_id,
            code=code,
        )
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
    message = _read_message(envelope, body, secret)
    raise _create_error(code, message, retry_after, task_id, _find_fail_code(envelope))


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
    fail_code = _printable(data.get("failCode"), secret) or None
    state = _read_state(state, has_fail_code=fail_code is not None)
    results = {name: data.get(name) for name in _RESULT_NAMES}
    result_urls = _find_result_urls(results) if state == "success" else []
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
        state=state,
        result_urls=result_urls,
        fail_code=fail_code,
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
    """Return the balance in US dollars from a balance reply in any of the likely shapes."""
    names = ("balance", "currentBalance", "current_balance", "amount")
    values = [data.get(name) for name in names] if isinstance(data, dict) else [data]
    for value in values:
        if isinstance(value, bool):
            continue
        try:
            dollars = float(value)  # type: ignore[arg-type] # float() rejects other types
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(dollars):
            return dollars
    raise UnreadableReplyError(f"The balance reply contains no number: {_printable(data, secret)}")


def _read_state(text: str, *, has_fail_code: bool) -> str:
    """Return `success` or `failed` for the words that mean it; any other state as it is."""
    word = _clean(text).lower()
    if word in _SUCCESS_STATES:
        return "success"
    if word in _FAILED_STATES or (word in _MAYBE_FAILED_STATES and has_fail_code):
        return "failed"
    return word if word in ("pending", "processing") else _clean(text)


def _find_result_urls(value: Any, depth: int = 0) -> list[str]:
    """Return the URLs in text, JSON text (even encoded twice), lists and objects."""
    if depth > _MAX_RESULT_DEPTH:
        return []
    if isinstance(value, str):
        parsed = _parse_json(value)
        if parsed is not None:
            return _find_result_urls(parsed, depth + 1)
        urls = _BETWEEN_URLS.split(value.strip())
        # A URL with unprintable characters (controls, lone surrogates) cannot be fetched.
        return [url for url in urls if _URL.match(url) and url.isprintable()]
    if isinstance(value, list):
        return [url for each in value for url in _find_result_urls(each, depth + 1)]
    if isinstance(value, dict):
        for name in _URL_NAMES:
            if urls := _find_result_urls(value.get(name), depth + 1):
                return urls
    return []


def _find_fail_code(envelope: dict[str, Any]) -> str | None:
    """Return the fail code that a refusal names, if any."""
    data = _as_dict(envelope.get("data"))
    names = ("failCode", "errorCode", "code", "error")
    values = [*map(data.get, names), envelope.get("message"), envelope.get("msg")]
    codes = (value for value in values if isinstance(value, str) and _FAIL_CODE.fullmatch(value))
    return next(codes, None)


def _find_task_id(data: Any) -> str:
    """Return the `taskId` in a submit's `data`, or an empty string if none is usable."""
    data = _as_dict(data)
    value = data.get("taskId", data.get("task_id"))
    task_id = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    task_id = task_id.strip()
    is_usable = task_id.isprintable() and 0 < len(task_id) <= _MAX_TASK_ID_CHARACTERS
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
    code: int, message: str, retry_after: float | None, task_id: str | None, fail_code: str | None
) -> ApiError:
    if code == _RATE_LIMITED:
        return RateLimitedError(
            f"429: {message}. A limit of the account was exceeded.",
            task_id=task_id,
            retry_after=retry_after,
        )
    if code >= 500:  # noqa: PLR2004
        return ServiceTroubleError(f"{code}: {message}.", task_id=task_id, code=code)
    if fail_code is not None and fail_code.replace("_", "").lower() in _BALANCE_CODES:
        code, fail_code = 402, None
    kind, advice = _REFUSALS.get(code, (RefusedError, "The service refused the request."))
    if task_id is not None and code not in _STATUS_ADVICE:
        advice = f"The service refused to tell the status of task {task_id}."
    return kind(f"{code}: {message}. {advice}", task_id=task_id, code=fail_code or code)


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
