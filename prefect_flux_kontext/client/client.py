"""The async client of the Flux Kontext service: submit, status and balance."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

import httpx
from pydantic import SecretStr

from prefect_flux_kontext.client.addresses import is_public_host
from prefect_flux_kontext.client.limits.account import AccountLimiter, shared_limiter
from prefect_flux_kontext.client.responses import (
    read_balance,
    read_envelope,
    read_status,
    read_task_id,
)
from prefect_flux_kontext.client.retry import jittered_backoff, parse_retry_after
from prefect_flux_kontext.client.transport import (
    API_TIMEOUT,
    AiohttpTransport,
    Connections,
    create_proxy_transport,
    create_tls_context,
    find_proxy,
    send_request,
)
from prefect_flux_kontext.errors import (
    ApiError,
    ConfigurationError,
    FluxKontextError,
    NotConnectedError,
    RateLimitedError,
    RefusedError,
    ReplyLostError,
    UnauthorizedError,
)
from prefect_flux_kontext.models import GenerationRequest, GenerationTask, TaskStatus
from prefect_flux_kontext.telemetry import count_requests, trace

__all__ = [
    "FluxKontextClient",
    "SubmitAttempts",
    "SubmitOutcome",
    "SubmitSlot",
    "normalize_api_key",
    "normalize_base_url",
]

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_SUBMIT_PATH = "/api/v1/generateTask/flux-kontext"
_STATUS_PATH = "/api/v1/statusTask/flux-kontext"
_BALANCE_SECONDS = 5.0
_BALANCE_PATH = "/api/v1/apikeys/current-balance"
_OWN_PATHS = ("", "/api/v1", _SUBMIT_PATH, _STATUS_PATH, _BALANCE_PATH)

# Errors after which the service cannot have received the request. A ProxyError means that the
# proxy refused to open the tunnel.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)

# How long the start waits for a service that gives no usable reply.
_START_PATIENCE_SECONDS = 60.0

# With the backoff between them, eight attempts take about a minute.
_CONNECT_ATTEMPTS = 8


class FluxKontextClient:
    """Async client of the Flux Kontext service.

    All clients of an account in a process share one limiter, which keeps every request within
    the account's limits. The client waits and retries after a 429; it never raises it. Use the
    client as an async context manager, on one event loop only.

    Args:
        api_key: API key of the account.
        base_url: Base URL of the service, in the form `https://host[:port]`.
        requests_per_minute: Request limit of the account. Submits and status requests count
            together.
        concurrent_tasks: Concurrency limit of the account: tasks that may run at the same time.
        transport: Transport to use instead of the network, for tests.
        limiter: Limiter to use instead of the account's shared one.

    Raises:
        ConfigurationError: The key or the base URL is invalid.

    Example:
        async with FluxKontextClient("key", base_url="http://127.0.0.1:8765") as client:
            task = await client.submit(GenerationRequest(prompt="a lighthouse at dusk"))
            status = await client.status(task.task_id)
    """

    def __init__(
        self,
        api_key: str | SecretStr,
        *,
        base_url: str = "https://api.apixo.ai",
        requests_per_minute: int = 10_000,
        concurrent_tasks: int = 1_000,
        transport: httpx.AsyncBaseTransport | None = None,
        limiter: AccountLimiter | None = None,
    ) -> None:
        self._key = normalize_api_key(api_key)
        self.base_url = normalize_base_url(base_url)
        self.limiter = limiter or shared_limiter(
            self.base_url,
            self._key,
            requests_per_minute=requests_per_minute,
            concurrent_tasks=concurrent_tasks,
        )
        self._connections = Connections(
            transport or self._create_transport(),
            timeout=API_TIMEOUT,
            headers={
                "Authorization": f"Bearer {self._key}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
            },
        )

    def __repr__(self) -> str:
        return f"FluxKontextClient(base_url={self.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connections.aclose()

    async def submit(self, request: GenerationRequest) -> GenerationTask:
        """Submit a generation. The service bills it when it accepts it.

        The POST is repeated only if it is known that the service did not accept it: no
        connection was made (up to eight attempts in about a minute), or the service answered
        429 (without limit).

        Args:
            request: The generation to submit. The client reads no references: the ratio `match`
                without a `matched_ratio` is sent as 16:9.

        Raises:
            RefusedError: The service refused the request (4xx). It was not accepted and not
                billed.
            NotConnectedError: No connection could be made. The request was not accepted.
            ReplyLostError: The reply was lost. The request may be accepted and billed.
            ServiceTroubleError: The service answered 5xx. The request may be accepted and
                billed.
            UnreadableReplyError: The reply does not follow the contract. The request may be
                accepted and billed.
        """
        attempts = self.submit_attempts()
        while not attempts.is_over:
            async with await attempts.next_slot() as slot:
                outcome = await slot.post(request)
        return outcome.to_task(request)

    def submit_attempts(self) -> SubmitAttempts:
        """Start submitting one request; see `SubmitAttempts`."""
        return SubmitAttempts(self)

    async def status(self, task_id: str) -> TaskStatus:
        """Return the status of a task. Counts as one request of the account's limit.

        Raises:
            ApiError: The request failed. If the error is `retryable`, request the status again.
        """
        return await self._request_until_allowed(
            functools.partial(read_status, task_id=task_id),
            f"{_STATUS_PATH}?{urlencode({'taskId': task_id})}",
            task_id=task_id,
        )

    async def balance(self) -> float:
        """Return the account's balance in US dollars.

        Raises:
            ApiError: The request failed, or the reply contains no number.
        """
        return await self._request_until_allowed(read_balance, _BALANCE_PATH)

    async def find_balance(self) -> float | None:
        """Return the balance in US dollars, or None if the service does not say within 5 s."""
        try:
            async with asyncio.timeout(_BALANCE_SECONDS):
                return await self.balance()
        except (ApiError, TimeoutError) as error:
            logger.debug("Balance unavailable: %s", error)
            return None

    async def check(self) -> float | None:
        """Check that the service answers and accepts the key, before anything is paid.

        A service that gives no usable reply (5xx, a redirect, HTML) is asked again for a minute.

        Returns:
            The balance in US dollars, or None if the service does not report it.

        Raises:
            NotConnectedError: The service at the base URL cannot be reached.
            UnauthorizedError: The key is missing or invalid.
            ServiceTroubleError: The service answered 5xx for a minute.
            UnreadableReplyError: The replies of a minute were not in the service's format.
            ReplyLostError: No complete reply arrived for a minute.
        """
        trouble: ApiError | None = None
        try:
            async with asyncio.timeout(_START_PATIENCE_SECONDS):
                for attempt in itertools.count(1):
                    try:
                        data = await self._ask_balance()
                        break
                    except (NotConnectedError, UnauthorizedError):
                        raise
                    except RefusedError as error:
                        logger.debug("Balance unavailable: %s", error)
                        return None
                    except ApiError as error:
                        trouble = error
                    await asyncio.sleep(jittered_backoff(attempt))
        except TimeoutError:
            if trouble is None:  # it answered 429, or is slow: no reason not to start
                return None
            raise type(trouble)(
                f"{self.base_url} gave no usable reply for {_START_PATIENCE_SECONDS:g} seconds, "
                f"so nothing was submitted. {trouble.message} Check FLUX_KONTEXT_BASE_URL.",
                code=trouble.code,
            ) from None
        try:
            return read_balance(data, secret=self._key)
        except ApiError as error:
            logger.debug("Balance unavailable: %s", error)
            return None

    async def is_answering(self) -> bool:
        """Return whether the service gives usable replies. Costs nothing."""
        try:
            await self._ask_balance()
        except RefusedError:
            return True  # it answers, for example that it tells no balance
        except ApiError:
            return False
        return True

    async def _ask_balance(self) -> Any:
        """Return the data of a balance reply, whatever it is."""
        return await self._request_until_allowed(lambda data, **_: data, _BALANCE_PATH)

    async def _request_until_allowed(
        self, read: Callable[..., _Result], path: str, *, task_id: str | None = None
    ) -> _Result:
        """Send a GET request, and repeat it for as long as the service answers 429."""
        for rejections in itertools.count(1):
            await self.limiter.requests.acquire()
            try:
                return await self._request(read, "GET", path, task_id=task_id)
            except RateLimitedError as error:
                if not error.retry_after:  # otherwise the limiter pauses all requests
                    await asyncio.sleep(jittered_backoff(rejections))
        raise AssertionError  # itertools.count() does not end

    @count_requests
    async def _request(
        self,
        read: Callable[..., _Result],
        method: str,
        path: str,
        *,
        body: object = None,
        task_id: str | None = None,
    ) -> _Result:
        """Send one request, for which the rate limiter has given leave, and read its `data`."""
        is_submit = method == "POST"
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            status, headers, reply = await send_request(
                self._connections, method, f"{self.base_url}{path}", json=body
            )
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            failure = self._transport_error(error, task_id)
        else:
            retry_after = parse_retry_after(headers.get("Retry-After"))
            try:
                data = read_envelope(
                    status, reply, retry_after=retry_after, task_id=task_id, secret=self._key
                )
            except RateLimitedError:
                self.limiter.record_rejection(retry_after, sent_at=sent_at, is_submit=is_submit)
                raise
            except ApiError:
                self.limiter.record_success(round_trip=loop.time() - sent_at)
                raise
            self.limiter.record_success(round_trip=loop.time() - sent_at)
            return read(data, secret=self._key)
        # Raised outside of the handler, so that the error has no reference to httpx's
        # error, whose request contains the key.
        raise failure

    def _transport_error(self, error: Exception, task_id: str | None) -> ApiError:
        reason = f"{type(error).__name__}: {error}".rstrip(": ").replace(self._key, "***")
        if isinstance(error, _NEVER_SENT):
            return NotConnectedError(
                f"Could not connect to {self.base_url} ({reason}). Nothing was sent. Check "
                "FLUX_KONTEXT_BASE_URL and the network.",
                task_id=task_id,
            )
        return ReplyLostError(
            f"The request to {self.base_url} was sent, but no complete reply was received "
            f"({reason}).",
            task_id=task_id,
        )

    def _create_transport(self) -> httpx.AsyncBaseTransport:
        # Use the environment's proxy for https only: it cannot see the key there.
        is_https = self.base_url.startswith("https")
        proxy = find_proxy(httpx.URL(self.base_url)) if is_https else None
        return create_proxy_transport(proxy) if proxy else AiohttpTransport(create_tls_context())


@dataclass(frozen=True)
class SubmitOutcome:
    """What is known after one POST: accepted, not accepted, or unknown, and why."""

    task_id: str = ""
    error: FluxKontextError | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether the service accepted the request, and so bills it."""
        return self.error is None

    @property
    def is_unknown(self) -> bool:
        """Whether the service may have accepted the request: it must not be sent again."""
        return self.error is not None and not self.error.not_accepted

    @property
    def is_rejected(self) -> bool:
        """Whether it is known that the service did not accept the request: it costs nothing."""
        return self.error is not None and self.error.not_accepted

    @property
    def is_usable_reply(self) -> bool:
        """Whether the service itself answered, in its own format."""
        return self.is_accepted or isinstance(self.error, RefusedError)

    @property
    def may_retry(self) -> bool:
        """Whether the request was not accepted and may be accepted later."""
        return self.error is not None and self.error.not_accepted and self.error.retryable

    def to_task(self, request: GenerationRequest) -> GenerationTask:
        """Return the accepted task, or raise the error."""
        if self.error is not None:
            raise self.error
        return GenerationTask(task_id=self.task_id, request=request)


class SubmitSlot:
    """A place for one more task at the account, and leave to send one request.

    An async context manager: leaving it gives the place back, unless the POST was accepted. Then
    the task holds it.
    """

    def __init__(self, client: FluxKontextClient, attempts: SubmitAttempts) -> None:
        self._client = client
        self._attempts = attempts
        self._acquired_at = asyncio.get_running_loop().time()
        self._is_open = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.release()

    @trace("submit")
    async def post(self, request: GenerationRequest) -> SubmitOutcome:
        """Send the request once. What the service or the network does is in the outcome."""
        limiter = self._client.limiter.tasks
        self._client._connections.check_open()  # noqa: SLF001 - one class in two parts
        try:
            task_id = await self._client._request(  # noqa: SLF001 - one class in two parts
                read_task_id, "POST", _SUBMIT_PATH, body=request.body()
            )
        except ApiError as error:
            outcome = SubmitOutcome(error=error)
            if isinstance(error, RateLimitedError) and not (
                self._client.limiter.is_request_limit(error.retry_after)
            ):
                self._is_open = False
                limiter.record_rejection(acquired_at=self._acquired_at)
        except Exception as error:  # noqa: BLE001 - nobody knows whether it was sent
            # Without a traceback: its frames hold the request, whose URLs may be signed.
            reason = f"{type(error).__name__}: {error}"
            lost = ReplyLostError(f"The submit met an unexpected error: {reason}")
            outcome = SubmitOutcome(error=lost)
        else:
            outcome = SubmitOutcome(task_id)
            self._is_open = False
            limiter.record_acceptance(task_id, acquired_at=self._acquired_at)
        self._attempts.record(outcome)
        return outcome

    def release(self) -> None:
        """Give the place back, if the POST has not used it."""
        if self._is_open:
            self._is_open = False
            self._client.limiter.tasks.release()


class SubmitAttempts:
    """The attempts to submit one request: the only place where a POST is repeated.

    There is a further attempt only if the service is known not to have accepted the one before,
    and may accept it later: no connection was made (up to eight attempts), or it answered 429.

    Example:
        attempts = client.submit_attempts()
        while not attempts.is_over:
            async with await attempts.next_slot() as slot:
                outcome = await slot.post(request)
    """

    def __init__(self, client: FluxKontextClient) -> None:
        self.is_over = False
        self._client = client
        self._rejections = 0
        self._failed_connects = 0
        self._delay = 0.0

    async def next_slot(self) -> SubmitSlot:
        """Wait until the account's limits allow the next attempt."""
        if self._delay:
            await asyncio.sleep(self._delay)
        await self._client.limiter.tasks.acquire()
        slot = SubmitSlot(self._client, self)
        try:
            await self._client.limiter.requests.acquire(has_priority=True)
        except BaseException:
            slot.release()
            raise
        return slot

    def record(self, outcome: SubmitOutcome) -> None:
        """Decide by what a POST came to whether there is another attempt, and when."""
        if isinstance(outcome.error, RateLimitedError):
            self._rejections += 1
            self._delay = jittered_backoff(self._rejections)
        elif outcome.may_retry:
            self._failed_connects += 1
            self._delay = jittered_backoff(self._failed_connects)
        self.is_over = not outcome.may_retry or self._failed_connects >= _CONNECT_ATTEMPTS


def normalize_api_key(api_key: str | SecretStr) -> str:
    """Return the key without white space around it and without `Bearer` before it.

    Raises:
        ConfigurationError: The key is empty or cannot be sent in a header.
    """
    key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
    key = re.sub(r"^\s*Bearer\s+", "", key, flags=re.IGNORECASE).strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "The API key is empty or has invalid characters. Set FLUX_KONTEXT_API_KEY or the "
            "Block's api_key."
        )
    return key


def normalize_base_url(base_url: str) -> str:
    """Return the base URL without the service's own path, which its pages show with it.

    Raises:
        ConfigurationError: The URL is not of the form https://host[:port], or has another path.
    """
    base_url = base_url.strip()
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    path = url.path.rstrip("/")
    if (
        url.scheme not in ("http", "https")
        or not url.host
        or url.userinfo
        or url.query
        or url.fragment
        or path not in _OWN_PATHS
    ):
        without_password = base_url.rpartition("@")[2]
        raise ConfigurationError(
            f"The base URL {without_password!r} is not of the form https://host[:port]. Set "
            "FLUX_KONTEXT_BASE_URL or the Block's base_url."
        )
    if url.scheme == "http" and is_public_host(url.host):
        raise ConfigurationError(
            f"The base URL {base_url!r} would send the API key unencrypted over public networks. "
            "Use https; http is for this machine and private networks."
        )
    return base_url.rstrip("/").removesuffix(path)
