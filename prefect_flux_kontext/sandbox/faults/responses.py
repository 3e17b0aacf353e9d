"""Faults in the content of the service's replies."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.sandbox.faults.registry import applies

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect_flux_kontext.sandbox.faults.exchange import Exchange

_ANOTHER_TASK = "task_0000000000000000"
_HOUR_MS = 3_600_000
_ENDED = ("completeTime", "costTime", "resultJson", "failCode", "failMsg")


async def _answer_with_changes(
    exchange: Exchange, change: Callable[[dict[str, Any]], None]
) -> None:
    """Send the service's reply with its `data` changed. Errors are sent unchanged."""
    reply = await exchange.call_service()
    if reply.status != 200:  # noqa: PLR2004 - HTTP's word for success
        await exchange.pass_on(reply)
        return
    envelope = json.loads(reply.body)
    change(envelope["data"])
    await exchange.answer_success(envelope["data"])


@applies("submit")
async def no_task_id(exchange: Exchange) -> None:
    """The task is accepted, and the reply has no task id."""
    await _answer_with_changes(exchange, lambda data: data.pop("taskId"))


@applies("submit", "status")
async def wrong_task_id(exchange: Exchange) -> None:
    """The reply has the id of a task that does not exist."""
    await _answer_with_changes(exchange, lambda data: data.update(taskId=_ANOTHER_TASK))


@applies("status")
async def not_found(exchange: Exchange) -> None:
    """404, the task is not known (yet)."""
    await exchange.call_service()
    await exchange.answer_error(404, "task not found")


@applies("status")
async def not_found_in_200(exchange: Exchange) -> None:
    """HTTP 200 with code 422, the task is not known (yet), in the envelope."""
    await exchange.call_service()
    await exchange.answer_error(422, "task not found", status=200)


@applies("status")
async def other_spelling(exchange: Exchange) -> None:
    """The state is in capitals, and the result URLs are objects, as JSON encoded twice."""

    def change(data: dict[str, Any]) -> None:
        data["state"] = data["state"].upper()
        if "resultJson" in data:
            urls = [{"url": url} for url in json.loads(data["resultJson"])["resultUrls"]]
            data["resultJson"] = json.dumps(json.dumps({"resultUrls": urls}))

    await _answer_with_changes(exchange, change)


@applies("status")
async def no_data(exchange: Exchange) -> None:
    """A success whose data is null."""
    await exchange.call_service()
    await exchange.answer_success(None)


@applies("status")
async def no_state(exchange: Exchange) -> None:
    """The reply has no state."""
    await _answer_with_changes(exchange, lambda data: data.pop("state"))


@applies("status")
async def unknown_state(exchange: Exchange) -> None:
    """The state is not one of the contract's."""
    await _answer_with_changes(exchange, lambda data: data.update(state="contemplating"))


@applies("status")
async def pending_again(exchange: Exchange) -> None:
    """The state is pending, whatever it was before."""
    await _answer_with_changes(exchange, lambda data: _mark_unended(data, "pending"))


@applies("status")
async def no_result_urls(exchange: Exchange) -> None:
    """A task that succeeded has no result URL."""
    await _answer_with_urls(exchange, lambda _url: [])


@applies("status")
async def many_result_urls(exchange: Exchange) -> None:
    """A task that succeeded has 100,000 result URLs."""
    await _answer_with_urls(exchange, lambda url: [url] * 100_000)


@applies("status")
async def foreign_result_url(exchange: Exchange) -> None:
    """The result URL of a task that succeeded is a file on the client's disk."""
    await _answer_with_urls(exchange, lambda _url: ["file:///etc/hostname"])


@applies("status")
async def skewed_clock(exchange: Exchange) -> None:
    """Times in the reply are alternately five hours early and five hours late."""
    shift = 5 * _HOUR_MS * (-1 if exchange.number % 2 else 1)

    def change(data: dict[str, Any]) -> None:
        for name in ("createTime", "completeTime"):
            if name in data:
                data[name] += shift

    await _answer_with_changes(exchange, change)


@applies("status")
async def deep_json(exchange: Exchange) -> None:
    """A reply of 100,000 nested lists."""
    await exchange.call_service()
    await exchange.answer(200, b"[" * 100_000 + b"]" * 100_000)


@applies("task")
async def never_ends(exchange: Exchange) -> None:
    """The task stays in processing; no callback is sent."""
    await _answer_with_changes(exchange, lambda data: _mark_unended(data, "processing"))


def _mark_unended(data: dict[str, Any], state: str) -> None:
    data["state"] = state
    for name in _ENDED:
        data.pop(name, None)


async def _answer_with_urls(exchange: Exchange, urls: Callable[[str], list[str]]) -> None:
    def change(data: dict[str, Any]) -> None:
        if "resultJson" in data:
            (url,) = json.loads(data["resultJson"])["resultUrls"]
            data["resultJson"] = json.dumps({"resultUrls": urls(url)})

    await _answer_with_changes(exchange, change)
