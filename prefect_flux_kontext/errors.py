"""Everything that can go wrong, as one tree.

::

    FluxKontextError
    ├── ConfigurationError           settings, credentials or arguments are wrong
    ├── ManifestError                the manifest cannot be read at all
    ├── ApiError                     a request to the service went wrong
    │   ├── NotConnectedError        it never left: DNS, refused, no free connection
    │   ├── ReplyLostError           it was sent, and no whole reply came back
    │   ├── UnreadableReplyError     a reply came that is not the contract's
    │   ├── ServiceTroubleError      500 and above
    │   └── RefusedError             any 4xx: known not to have been accepted
    │       ├── InvalidRequestError      400
    │       ├── UnauthorizedError        401
    │       ├── InsufficientBalanceError 402
    │       ├── ForbiddenError           403
    │       ├── NotFoundError            404
    │       └── RateLimitedError         429
    ├── GenerationFailedError        the service gave up on the task and says why
    ├── GenerationTimeoutError       the task did not end before our deadline
    ├── DownloadError                a result could not be fetched
    │   └── RefusedUrlError          its URL leads where no download may go
    ├── StorageError                 the output refused a file
    ├── LedgerError                  a record of what was paid cannot be trusted
    ├── ReferenceImageError          a reference image is not to be had, or not to be used
    ├── InvalidImageError            the bytes are not a whole image of the promised kind
    └── BatchStoppedError            the batch ended before its rows did
        └── BudgetReachedError           the next image would have passed the budget

Three questions a caller may ask of each: was the request known not to be accepted
(`not_accepted`), may the same request be made again later (`retryable`), and is there no
point in going on with other rows (`fatal`). None of them ever holds the API key, nor a
request or response object that would.
"""

from __future__ import annotations

from typing import ClassVar


class FluxKontextError(Exception):
    """The root: catching it catches everything this package raises on purpose.

    Args:
        message: What happened and what to do, for a person.
        task_id: The service's task, where there is one. A paid image hangs on it.
        code: The service's own code, an HTTP-like number or a fail code, kept verbatim.
    """

    not_accepted: ClassVar[bool] = False
    retryable: ClassVar[bool] = False
    fatal: ClassVar[bool] = False

    def __init__(
        self, message: str, *, task_id: str | None = None, code: int | str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.task_id = task_id
        self.code = code

    @property
    def reason(self) -> str:
        """A short word to count failures by: the service's code, else the error's name."""
        return str(self.code) if self.code is not None else type(self).__name__


class ConfigurationError(FluxKontextError):
    """Settings, credentials or arguments are wrong; nothing was sent."""

    not_accepted = True
    fatal = True


class ManifestError(FluxKontextError):
    """The manifest cannot be read at all; nothing was sent."""

    not_accepted = True
    fatal = True


class ApiError(FluxKontextError):
    """A request to the service went wrong."""


class NotConnectedError(ApiError):
    """The request never left this machine, so it was not accepted."""

    not_accepted = True
    retryable = True
    fatal = True


class ReplyLostError(ApiError):
    """The request was sent and no whole reply came back: a submit may have been accepted."""

    retryable = True


class UnreadableReplyError(ApiError):
    """A reply came that is not the contract's: a submit may have been accepted."""

    retryable = True


class ServiceTroubleError(ApiError):
    """The service answered 500 or above: a submit may have been accepted."""

    retryable = True


class RefusedError(ApiError):
    """The service refused the request (a 4xx): it was not accepted and costs nothing."""

    not_accepted = True


class InvalidRequestError(RefusedError):
    """400: the parameters are wrong; the same request will never do."""


class UnauthorizedError(RefusedError):
    """401: the key is missing or invalid."""

    fatal = True


class InsufficientBalanceError(RefusedError):
    """402: the account's balance is too low."""

    fatal = True


class ForbiddenError(RefusedError):
    """403: not allowed, or against the content rules."""


class NotFoundError(RefusedError):
    """404: no such task or model."""


class RateLimitedError(RefusedError):
    """429: one of the account's limits was passed.

    Args:
        retry_after: Seconds the service asks to wait, where it says so.
    """

    retryable = True

    def __init__(
        self,
        message: str,
        *,
        task_id: str | None = None,
        code: int | str | None = 429,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, task_id=task_id, code=code)
        self.retry_after = retry_after


class GenerationFailedError(FluxKontextError):
    """The service gave up on the task; `code` is its fail code, `message` its reason."""


class GenerationTimeoutError(FluxKontextError):
    """The task did not end before the deadline; it may still, and is paid for either way."""


class DownloadError(FluxKontextError):
    """A result could not be fetched; the task stays paid and can be persisted again."""

    retryable = True


class RefusedUrlError(DownloadError):
    """A result's URL leads where no download may go: another scheme, this machine, its network."""

    retryable = False


class StorageError(FluxKontextError):
    """The output refused a file; the task stays paid and can be persisted again."""

    retryable = True


class LedgerError(FluxKontextError):
    """A record of what was paid cannot be read, written or trusted; its row is not paid for."""


class ReferenceImageError(FluxKontextError):
    """A reference image is missing, has changed or is none; nothing was sent for its row."""

    not_accepted = True


class InvalidImageError(FluxKontextError):
    """The bytes are not a whole image of the promised kind."""

    retryable = True


class BatchStoppedError(FluxKontextError):
    """The batch ended before its rows did; the message counts what is left."""

    fatal = True


class BudgetReachedError(BatchStoppedError):
    """The next image would have cost more than the budget has left; it was not submitted."""
