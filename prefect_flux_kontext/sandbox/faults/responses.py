"""Faults in the content of the service's replies."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.sandbox.faults.registry import applies, register

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect_flux_kontext.sandbox.faults.exchange import Exchange

_HOUR_MS = 3_600_000


def changes(*kinds: str) -> Callable[[Callable[[dict[str, Any], int], None]], None]:
    """Register a function that changes the `data` of the n-th reply. Errors are sent unchanged."""

    def decorate(change: Callable[[dict[str, Any], int], None]) -> None:
        async def handler(exchange: Exchange) -> None:
            reply = await exchange.call_service()
            if reply.status != 200:  # noqa: PLR2004 - HTTP's word for success
                await exchange.pass_on(reply)
                return
            data = json.loads(reply.body)["data"]
            change(data, exchange.number)
            await exchange.answer_success(data)

        name = change.__name__.replace("_", "-")
        register(kinds, name, (change.__doc__ or "").rstrip("."), handler)

    return decorate


@changes("submit")
def no_task_id(data: dict[str, Any], _number: int) -> None:
    """The task is accepted, and the reply has no task id."""
    del data["taskId"]


@changes("submit", "status")
def wrong_task_id(data: dict[str, Any], _number: int) -> None:
    """The reply has the id of a task that does not exist."""
    data["taskId"] = "task_0000000000000000"


@changes("status")
def other_spelling(data: dict[str, Any], _number: int) -> None:
    """The state is in capitals, and the result URLs are objects, as JSON encoded twice."""
    data["state"] = data["state"].upper()
    if "resultJson" in data:
        urls = [{"url": url} for url in json.loads(data["resultJson"])["resultUrls"]]
        data["resultJson"] = json.dumps(json.dumps({"resultUrls": urls}))


@changes("status")
def no_state(data: dict[str, Any], _number: int) -> None:
    """The reply has no state."""
    del data["state"]


@changes("status")
def unknown_state(data: dict[str, Any], _number: int) -> None:
    """The state is not one of the contract's."""
    data["state"] = "contemplating"


@changes("status")
def pending_again(data: dict[str, Any], _number: int) -> None:
    """The state is pending, whatever it was before."""
    _mark_unended(data, "pending")


@changes("task")
def never_ends(data: dict[str, Any], _number: int) -> None:
    """The task stays in processing; no callback is sent."""
    _mark_unended(data, "processing")


@changes("status")
def no_result_urls(data: dict[str, Any], _number: int) -> None:
    """A task that succeeded has no result URL."""
    _change_urls(data, lambda _url: [])


@changes("status")
def many_result_urls(data: dict[str, Any], _number: int) -> None:
    """A task that succeeded has 100,000 result URLs."""
    _change_urls(data, lambda url: [url] * 100_000)


@changes("status")
def foreign_result_url(data: dict[str, Any], _number: int) -> None:
    """The result URL of a task that succeeded is a file on the client's disk."""
    _change_urls(data, lambda _url: ["file:///etc/hostname"])


@changes("status")
def skewed_clock(data: dict[str, Any], number: int) -> None:
    """Times in the reply are alternately five hours early and five hours late."""
    for name in data.keys() & {"createTime", "completeTime"}:
        data[name] += 5 * _HOUR_MS * (-1 if number % 2 else 1)


@applies("status")
async def no_data(exchange: Exchange) -> None:
    """A success whose data is null."""
    await exchange.call_service()
    await exchange.answer_success(None)


@applies("status")
async def deep_json(exchange: Exchange) -> None:
    """A reply of 100,000 nested lists."""
    await exchange.call_service()
    await exchange.answer(200, b"[" * 100_000 + b"]" * 100_000)


def _mark_unended(data: dict[str, Any], state: str) -> None:
    data["state"] = state
    for name in ("completeTime", "costTime", "resultJson", "failCode", "failMsg"):
        data.pop(name, None)


def _change_urls(data: dict[str, Any], change: Callable[[str], list[str]]) -> None:
    if "resultJson" in data:
        (url,) = json.loads(data["resultJson"])["resultUrls"]
        data["resultJson"] = json.dumps({"resultUrls": change(url)})
