"""The exceptions of the package, as one tree.

::

    FluxKontextError
    ├── ConfigurationError           invalid settings, credentials or arguments
    ├── ManifestError                the manifest cannot be read
    ├── ApiError                     a request to the service failed
    │   ├── NotConnectedError        not sent: DNS, connection refused, no free connection
    │   ├── ReplyLostError           sent, but no complete reply was received
    │   ├── UnreadableReplyError     the reply does not follow the service's contract
    │   ├── ServiceTroubleError      5xx
    │   └── RefusedError             4xx: known not to have been accepted
    │       ├── InvalidRequestError      400
    │       ├── UnauthorizedError        401
    │       ├── InsufficientBalanceError 402
    │       ├── ForbiddenError           403
    │       ├── NotFoundError            404
    │       └── RateLimitedError         429
    ├── GenerationFailedError        the service reports that the task failed
    ├── GenerationTimeoutError       the task did not end before the deadline
    ├── DownloadError                a result could not be downloaded
    │   └── RefusedUrlError          the result's URL leads to an address that is not allowed
    ├── StorageError                 the output could not store a file
    ├── LedgerError                  a ledger record cannot be read, written or trusted
    ├── ReferenceImageError          a reference image is missing, changed or invalid
    ├── InvalidImageError            the bytes are not a complete image of an expected format
    └── BatchStoppedError            the batch stopped before all of its rows ended
        └── BudgetReachedError           the next image would exceed the budget
            └── GroupBudgetReachedError      it would exceed the budget of rows like it

Each class answers three questions for the caller: is it known that the request was not accepted
(`not_accepted`), can the same request be made again later (`retryable`), and would the other
rows of a batch fail in the same way (`fatal`). No error holds the API key, or a request or
response object that contains it.
"""

from __future__ import annotations

from typing import ClassVar

from prefect_flux_kontext.redaction import make_showable


class FluxKontextError(Exception):
    """Base class of all exceptions that this package raises.

    Args:
        message: What happened and what to do. Secrets in its URLs are removed, and control
            characters escaped.
        task_id: The task at the service, if there is one. It is needed to fetch a paid image.
        code: The service's code, unchanged: a number as in HTTP, or a fail code.

    Attributes:
        not_accepted: Whether it is known that the service did not accept, and so did not bill,
            the request.
        retryable: Whether the same request may succeed later.
        fatal: Whether other rows would fail in the same way, so that a batch stops.
    """

    not_accepted: ClassVar[bool] = False
    retryable: ClassVar[bool] = False
    fatal: ClassVar[bool] = False

    def __init__(
        self, message: str, *, task_id: str | None = None, code: int | str | None = None
    ) -> None:
        self.message = make_showable(message)
        super().__init__(self.message)
        self.task_id = task_id
        self.code = code

    @property
    def reason(self) -> str:
        """The service's code, else the name of the class: a short label to group failures."""
        return str(self.code) if self.code is not None else type(self).__name__


class ConfigurationError(FluxKontextError):
    """Settings, credentials or arguments are invalid. Nothing was sent."""

    not_accepted = True
    fatal = True


class ManifestError(FluxKontextError):
    """The manifest cannot be read, or has invalid rows. Nothing was sent."""

    not_accepted = True
    fatal = True


class ApiError(FluxKontextError):
    """Base class of errors of requests to the service."""


class NotConnectedError(ApiError):
    """No connection was made, so the request was not sent and not accepted."""

    not_accepted = True
    retryable = True
    fatal = True


class ReplyLostError(ApiError):
    """The request was sent, but no complete reply was received. A submit may be accepted."""

    retryable = True


class UnreadableReplyError(ApiError):
    """The reply does not follow the service's contract. A submit may have been accepted."""

    retryable = True


class ServiceTroubleError(ApiError):
    """The service answered with 500 or above. A submit may have been accepted."""

    retryable = True


class RefusedError(ApiError):
    """The service refused the request (4xx). It was not accepted and not billed."""

    not_accepted = True


class InvalidRequestError(RefusedError):
    """400: the parameters are invalid. Not retryable."""


class UnauthorizedError(RefusedError):
    """401: the key is missing or invalid."""

    fatal = True


class InsufficientBalanceError(RefusedError):
    """402: the account's balance is too low."""

    fatal = True


class ForbiddenError(RefusedError):
    """403: not allowed, or against the content policy."""


class NotFoundError(RefusedError):
    """404: the task or model does not exist."""


class RateLimitedError(RefusedError):
    """429: a limit of the account was exceeded.

    Args:
        message: What happened and what to do.
        task_id: The task that the request was about, if any.
        code: The service's code.
        retry_after: Seconds to wait, from the `Retry-After` header, if the service sent one.
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
    """The service reports that the task failed. `code` is its fail code."""


class GenerationTimeoutError(FluxKontextError):
    """The task did not end before the deadline. It is paid for and may still end."""


class DownloadError(FluxKontextError):
    """A result could not be downloaded. The task is paid for; persist it again later."""

    retryable = True


class RefusedUrlError(DownloadError):
    """A result's URL has a scheme or leads to an address that is not allowed.

    Not allowed are schemes other than http and https, this machine and its private network.
    """

    retryable = False


class StorageError(FluxKontextError):
    """The output could not store a file. The task is paid for; persist it again later."""

    retryable = True


class LedgerError(FluxKontextError):
    """A ledger record cannot be read, written or trusted, so its row is not submitted."""


class ReferenceImageError(FluxKontextError):
    """A reference image is missing, changed or invalid. Nothing was sent for its row."""

    not_accepted = True


class InvalidImageError(FluxKontextError):
    """The bytes are not a complete image of an expected format."""

    retryable = True


class BatchStoppedError(FluxKontextError):
    """The batch stopped before all of its rows ended. The message counts what is left."""

    fatal = True


class BudgetReachedError(BatchStoppedError):
    """The next image would exceed the budget. It was not submitted."""


class GroupBudgetReachedError(BudgetReachedError):
    """The next image would exceed the budget of the rows with its value in a column."""

    fatal = False
