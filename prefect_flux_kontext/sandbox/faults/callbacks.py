"""Faults of callbacks."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from prefect_flux_kontext.sandbox.faults.registry import FAULTS, applies

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.callbacks import CallbackSender
    from prefect_flux_kontext.sandbox.contract import JsonObject
    from prefect_flux_kontext.sandbox.faults.injector import ActiveFaults


async def deliver(
    weather: ActiveFaults, courier: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """Deliver a callback in the present weather; False when it never arrived."""
    fault, _ = weather.applies("callback")
    if fault is None:
        return await courier.deliver(url, envelope)
    delivered: bool = await FAULTS["callback"][fault](weather, courier, url, envelope)
    return delivered


@applies("callback")
async def lost(
    _weather: ActiveFaults, _courier: CallbackSender, _url: str, _envelope: JsonObject
) -> bool:
    """It is never delivered."""
    return False


@applies("callback")
async def doubled(
    _weather: ActiveFaults, courier: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """It is delivered twice."""
    first = await courier.deliver(url, envelope)
    return await courier.deliver(url, envelope) or first


@applies("callback")
async def late(
    weather: ActiveFaults, courier: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """It is delivered `late` seconds late."""
    await asyncio.sleep(weather.plan.late)
    return await courier.deliver(url, envelope)


@applies("callback")
async def overtaken(
    weather: ActiveFaults, courier: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """It is delivered up to `late` seconds late, so that others overtake it."""
    # By its URL, which no other callback has.
    await asyncio.sleep(random.Random(url).uniform(0, weather.plan.late))
    return await courier.deliver(url, envelope)


@applies("callback")
async def forged(
    _weather: ActiveFaults, courier: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """Before it comes a stranger's, at the right URL, with another task and result."""
    await courier.deliver(url, _strangers())
    return await courier.deliver(url, envelope)


@applies("callback")
async def misdirected(
    _weather: ActiveFaults, courier: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """Before it comes a stranger's, at a URL whose last part was guessed."""
    where = urlsplit(url)
    guessed = where.path.rpartition("/")[0] + "/guessed"
    await courier.deliver(urlunsplit(where._replace(path=guessed)), _strangers())
    return await courier.deliver(url, envelope)


def _strangers() -> JsonObject:
    result = json.dumps({"resultUrls": ["file:///etc/hostname"]})
    data = {"taskId": "task_ffffffffffffffff", "state": "success", "resultJson": result}
    return {"code": 200, "message": "success", "data": data}
