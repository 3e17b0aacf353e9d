"""Reading what the service answers, tolerantly: pure functions, no I/O.

An error may arrive as an HTTP status or as HTTP 200 with another `code` in the envelope;
both mean the same. Anything may be missing, null or of another type.
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

_LONGEST_TASK_ID = 200
_LONGEST_MESSAGE = 500
_MOST_RESULTS = 100
_SUCCESS = range(200, 300)
_RATE_LIMITED = 429
# A message may repeat the URL of a reference: from what signs it on, that is nobody's to read.
_SIGNED = re.compile(
    r"(?:[?&]|%3f|%26)(?:x-amz-|x-goog-|awsaccesskeyid=|googleaccessid=|signature=|sig=|sv=)"
    r"[^\s\"'<>]*",
    re.IGNORECASE,
)

_REFUSALS: dict[int, tuple[type[RefusedError], str]] = {
    400: (InvalidRequestError, "Correct the request; it costs nothing."),
    401: (UnauthorizedError, "Check the API key: FLUX_KONTEXT_API_KEY or the Block's api_key."),
    402: (InsufficientBalanceError, "Top up the account, then run again."),
    403: (ForbiddenError, "The account may not do this, or the content rules forbid it."),
    404: (NotFoundError, "No such task or model; check FLUX_KONTEXT_BASE_URL and the task id."),
}


def read_envelope(
    status: int,
    body: bytes,
    *,
    retry_after: float | None = None,
    task_id: str | None = None,
    secret: str = "",
) -> Any:
    """Return the `data` of a successful reply, or raise what the reply says went wrong.

    Args:
        status: The HTTP status.
        body: The whole body.
        retry_after: Seconds from the `Retry-After` header.
        task_id: The task the request was about; None for a submit.
        secret: What no message may repeat.

    Raises:
        ApiError: The subclass for the code, by HTTP status first, else by the envelope.
    """
    envelope = _as_dict(_json(body))
    data = envelope.get("data")
    code = _as_int(envelope.get("code"), default=status) if status in _SUCCESS else status
    if code in _SUCCESS and envelope:
        return data
    if task_id is None and (named := _task_id(data)):
        raise UnreadableReplyError(
            f"The reply refuses ({code}) and names task {named} at once, so the task may have "
            "been accepted and billed.",
            task_id=named,
            code=code,
        )
    if not 400 <= code <= 599:  # noqa: PLR2004 - the range of HTTP's errors
        raise UnreadableReplyError(
            f"The reply (HTTP {status}) is not the service's: {_glimpse(body, secret)}",
            task_id=task_id,
            code=None if code in _SUCCESS else code,
        )
    raise _error(code, _said(envelope, body, secret), retry_after, task_id)


def _error(code: int, said: str, retry_after: float | None, task_id: str | None) -> ApiError:
    if code == _RATE_LIMITED:
        return RateLimitedError(
            f"429: {said}. A limit of the account was passed.",
            task_id=task_id,
            retry_after=retry_after,
        )
    if code >= 500:  # noqa: PLR2004
        return ServiceTroubleError(f"{code}: {said}.", task_id=task_id, code=code)
    kind, advice = _REFUSALS.get(code, (RefusedError, "The request was refused."))
    return kind(f"{code}: {said}. {advice}", task_id=task_id, code=code)


def read_task_id(data: Any, *, secret: str = "") -> str:
    """The `taskId` of an accepted submit.

    Raises:
        UnreadableReplyError: There is none that could be a task id. The submit may have been
            accepted all the same.
    """
    task_id = _task_id(data)
    if not task_id:
        raise UnreadableReplyError(
            "The service answered 200 without a usable taskId, so the task may have been "
            f"accepted and billed. Its data: {_text(data, secret)}"
        )
    return task_id


def read_status(data: Any, *, task_id: str, secret: str = "") -> TaskStatus:
    """The status in a reply's `data`.

    Raises:
        UnreadableReplyError: It is about another task, has no state, or says `success` without
            a result URL, or with too many; asking again may help.
    """
    data = _as_dict(data)
    told = data.get("taskId")
    if told is not None and _text(told) != task_id:
        raise UnreadableReplyError(
            f"Asked for task {task_id}, the service answered for {_text(told, secret)[:80]!r}.",
            task_id=task_id,
        )
    state = data.get("state")
    if not isinstance(state, str) or not _clean(state):
        raise UnreadableReplyError("The status reply has no state.", task_id=task_id)
    result_urls = _result_urls(data.get("resultJson")) if state == "success" else []
    if state == "success" and not result_urls:
        raise UnreadableReplyError(
            "The task succeeded, but its resultJson holds no result URL.", task_id=task_id
        )
    if len(result_urls) > _MOST_RESULTS:
        raise UnreadableReplyError(
            f"The task succeeded with {len(result_urls):,} result URLs; one task has no more than "
            f"{_MOST_RESULTS} images.",
            task_id=task_id,
        )
    return TaskStatus(
        task_id=task_id,
        state=_clean(state),
        result_urls=result_urls,
        fail_code=_text(data.get("failCode"), secret) or None,
        fail_message=_text(data.get("failMsg"), secret) or None,
        created_at=_as_moment(data.get("createTime")),
        completed_at=_as_moment(data.get("completeTime")),
        generation_seconds=_as_seconds(data.get("costTime")),
    )


def read_callback(body: bytes) -> str | None:
    """The task that a callback tells of, or None: whatever else it says, the status tells."""
    envelope = _as_dict(_json(body))
    return _task_id(envelope.get("data")) or _task_id(envelope) or None


def read_balance(data: Any, *, secret: str = "") -> float:
    """The dollars in a balance reply, whichever of the likely shapes it has.

    Raises:
        UnreadableReplyError: There is no number in it.
    """
    names = ("balance", "currentBalance", "current_balance", "amount")
    values = [data.get(name) for name in names] if isinstance(data, dict) else [data]
    for value in values:
        try:
            dollars = float(value)  # type: ignore[arg-type] # whatever it is, float() judges
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(dollars):
            return dollars
    raise UnreadableReplyError(f"The balance reply holds no number: {_text(data, secret)}")


def _result_urls(value: Any) -> list[str]:
    if isinstance(value, str):
        value = _json(value)
    urls = value.get("resultUrls") if isinstance(value, dict) else value
    if not isinstance(urls, list):
        return []
    # What does not print (controls, lone surrogates) is in no URL that can be fetched.
    return [url for url in urls if isinstance(url, str) and url and url.isprintable()]


def _task_id(data: Any) -> str:
    """The `taskId` in a submit's `data`, or nothing where there is none that could be one."""
    value = _as_dict(data).get("taskId")
    task_id = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    usable = task_id.isprintable() and 0 < len(task_id.strip()) <= _LONGEST_TASK_ID
    return task_id if usable else ""


def _json(text: str | bytes) -> Any:
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


def _said(envelope: dict[str, Any], body: bytes, secret: str) -> str:
    error = _as_dict(envelope.get("data")).get("error")
    parts = (envelope.get("message"), envelope.get("msg"), error)
    said = ": ".join(dict.fromkeys(_text(part, secret) for part in parts if part))
    return said.rstrip(".") or _glimpse(body, secret)


def _glimpse(body: bytes, secret: str) -> str:
    text = body[: 80 + len(secret)].decode(errors="replace")
    return _text(text, secret)[:80] or "an empty body"


def _text(value: Any, secret: str = "") -> str:
    """Anything from outside as text that can be shown; nothing for None."""
    text = "" if value is None else _SIGNED.sub("…", str(value))
    # Before it is cut to length: half a secret is one too.
    return _clean(text.replace(secret, "***") if secret else text)


def _clean(text: str) -> str:
    """Text from outside on one line, without control characters, of bounded length."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[
        :_LONGEST_MESSAGE
    ]
