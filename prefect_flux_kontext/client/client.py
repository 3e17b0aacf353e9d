"""The two things a client is made of, checked before they are used."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar
from urllib.parse import urlencode

import httpx
from pydantic import SecretStr

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
    NotConnectedError,
    RateLimitedError,
    ReplyLostError,
    UnauthorizedError,
)
from prefect_flux_kontext.models import GenerationTask

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from prefect_flux_kontext.models import GenerationRequest, TaskStatus


def normalize_api_key(api_key: str | SecretStr) -> str:
    """The key without the white space that files and shells leave around it.

    Raises:
        ConfigurationError: It is empty, or cannot stand in a header.
    """
    key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "The API key is empty or has characters that no key has. Set FLUX_KONTEXT_API_KEY "
            "or the Block's api_key."
        )
    return key


def normalize_base_url(base_url: str) -> str:
    """The base URL without a slash at its end.

    Raises:
        ConfigurationError: It is not of the form https://host[:port].
    """
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if (
        url.scheme not in ("http", "https")
        or not url.host
        or url.userinfo
        or url.query
        or url.fragment
    ):
        without_password = base_url.rpartition("@")[2]
        raise ConfigurationError(
            f"The base URL {without_password!r} is not of the form https://host[:port]. Set "
            "FLUX_KONTEXT_BASE_URL or the Block's base_url."
        )
    return base_url.rstrip("/")


logger = logging.getLogger(__name__)

_Read = TypeVar("_Read")

AroundPost: TypeAlias = "Callable[[], AbstractAsyncContextManager[GenerationRequest | None]]"

_SUBMIT = "/api/v1/generateTask/flux-kontext"
_STATUS = "/api/v1/statusTask/flux-kontext"
_BALANCE = "/api/v1/apikeys/current-balance"

# A ProxyError is the proxy's refusal to connect us.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_CONNECT_ATTEMPTS = 8


class FluxKontextClient:
    """The Flux Kontext service: submit a generation, ask how it is doing, read the balance.

    Every request is kept within the account's limits by a governor that all clients of the
    account in this process share, and a 429 is waited out, never raised. Use it as an async
    context manager, on the event loop that it was entered on.

    Args:
        api_key: The account's key.
        base_url: Where the service is, without a path.
        requests_per_minute: The account's limit, submits and polls together.
        concurrent_tasks: The account's limit of tasks running at once.
        transport: Another way to reach the service than the network, for tests.
        governor: Another governor than the account's shared one.

    Raises:
        ConfigurationError: The key or the base URL cannot be right.

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
        governor: AccountLimiter | None = None,
    ) -> None:
        self._key = normalize_api_key(api_key)
        self.base_url = normalize_base_url(base_url)
        self.governor = governor or shared_limiter(
            self.base_url,
            self._key,
            requests_per_minute=requests_per_minute,
            concurrent_tasks=concurrent_tasks,
        )
        self._connections = Connections(
            transport or self._transport(),
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

    def _transport(self) -> httpx.AsyncBaseTransport:
        # A proxy of the environment is used for https, where it does not see the key.
        https = self.base_url.startswith("https")
        proxy = find_proxy(httpx.URL(self.base_url)) if https else None
        return create_proxy_transport(proxy) if proxy else AiohttpTransport(create_tls_context())

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connections.aclose()

    async def submit(
        self,
        request: GenerationRequest,
        *,
        around_post: AroundPost = nullcontext,
    ) -> GenerationTask:
        """Submit a generation; from the reply on it is billed.

        The POST is repeated only when it is known not to have been accepted: when the
        connection was never made (up to eight times, in about a minute) or the service answered
        429 (for ever).

        Args:
            request: What to make.
            around_post: Makes a context for each POST, entered when the limits allow it: the
                last moment to raise and send nothing. What went wrong is raised inside it. Where
                it gives a request, that is sent instead, and kept nowhere.

        Raises:
            RefusedError: The service refused it (4xx): not accepted, costs nothing.
            NotConnectedError: The service cannot be reached: not accepted.
            ReplyLostError: The reply was lost: it may have been accepted and billed.
            ServiceTroubleError: A 5xx: it may have been accepted and billed.
            UnreadableReplyError: Not the contract's reply: it may have been accepted.
        """
        gate = self.governor.tasks
        body = request.body()
        unconnected = refused = 0
        while True:
            await gate.enter()
            entered_at = asyncio.get_running_loop().time()
            task_id = None
            limited = False
            try:
                task_id = await self._request(
                    read_task_id, "POST", _SUBMIT, body=body, around=around_post
                )
            except RateLimitedError:
                limited = True
                refused += 1
            except NotConnectedError:
                unconnected += 1
                if unconnected == _CONNECT_ATTEMPTS:
                    raise
            finally:
                if task_id is not None:
                    gate.accepted(task_id, entered_at=entered_at)
                elif limited:
                    gate.refused(entered_at=entered_at)
                else:
                    gate.not_accepted()
            if task_id is not None:
                return GenerationTask(task_id=task_id, request=request)
            await asyncio.sleep(jittered_backoff(refused if limited else unconnected))

    async def status(self, task_id: str) -> TaskStatus:
        """Ask how a task is doing. Costs one request of the account's budget.

        Raises:
            ApiError: The request went wrong; where the error is `retryable`, ask again.
        """
        return await self._request_until_allowed(
            functools.partial(read_status, task_id=task_id),
            f"{_STATUS}?{urlencode({'taskId': task_id})}",
            task_id=task_id,
        )

    async def balance(self) -> float:
        """The account's balance in dollars.

        Raises:
            ApiError: The request went wrong, or the reply holds no number.
        """
        return await self._request_until_allowed(read_balance, _BALANCE)

    async def check(self) -> float | None:
        """Make sure that the service is there and knows the key, before anything is paid.

        Returns:
            The balance in dollars, or None where the service does not tell it.

        Raises:
            NotConnectedError: Nothing answers at the base URL.
            UnauthorizedError: The key is missing or invalid.
        """
        try:
            return await self.balance()
        except (NotConnectedError, UnauthorizedError):
            raise
        except ApiError as error:
            logger.debug("The balance is not to be had: %s", error)
            return None

    async def _request_until_allowed(
        self, read: Callable[..., _Read], path: str, *, task_id: str | None = None
    ) -> _Read:
        for refused in itertools.count(1):
            try:
                return await self._request(read, "GET", path, task_id=task_id)
            except RateLimitedError as error:
                if not error.retry_after:  # else the governor keeps all requests back
                    await asyncio.sleep(jittered_backoff(refused))
        raise AssertionError  # the count has no end

    async def _request(
        self,
        read: Callable[..., _Read],
        method: str,
        path: str,
        *,
        body: object = None,
        task_id: str | None = None,
        around: AroundPost = nullcontext,
    ) -> _Read:
        """Send one request when the budget allows it, and read the reply's `data`."""
        submit = method == "POST"
        await self.governor.requests.take(first=submit)
        async with around() as instead:
            if instead is not None:
                body = instead.body()
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
                    self.governor.refused(retry_after, sent_at=sent_at, submit=submit)
                    raise
                except ApiError:
                    self.governor.heard(after=loop.time() - sent_at)
                    raise
                self.governor.heard(after=loop.time() - sent_at)
                return read(data, secret=self._key)
            # Raised here, outside the handler: httpx's error carries the key in its request.
            raise failure

    def _transport_error(self, error: Exception, task_id: str | None) -> ApiError:
        told = f"{type(error).__name__}: {error}".rstrip(": ").replace(self._key, "***")
        if isinstance(error, _NEVER_SENT):
            return NotConnectedError(
                f"Could not connect to {self.base_url} ({told}). Nothing was sent; check "
                "FLUX_KONTEXT_BASE_URL and the network.",
                task_id=task_id,
            )
        return ReplyLostError(
            f"The request to {self.base_url} was sent, but no whole reply came ({told}).",
            task_id=task_id,
        )
