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
    faults: ActiveFaults, sender: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """Deliver a callback under the active faults; return whether it arrived."""
    fault, _ = faults.applies("callback")
    if fault is None:
        return await sender.deliver(url, envelope)
    delivered: bool = await FAULTS["callback"][fault](faults, sender, url, envelope)
    return delivered


@applies("callback")
async def lost(
    _faults: ActiveFaults, _sender: CallbackSender, _url: str, _envelope: JsonObject
) -> bool:
    """It is never delivered."""
    return False


@applies("callback")
async def doubled(
    _faults: ActiveFaults, sender: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """It is delivered twice."""
    first = await sender.deliver(url, envelope)
    return await sender.deliver(url, envelope) or first


@applies("callback")
async def late(
    faults: ActiveFaults, sender: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """It is delivered `late` seconds late."""
    await asyncio.sleep(faults.plan.late)
    return await sender.deliver(url, envelope)


@applies("callback")
async def overtaken(
    faults: ActiveFaults, sender: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """It is delivered up to `late` seconds late, so others arrive first."""
    # Seeded with the URL, which no other callback has.
    await asyncio.sleep(random.Random(url).uniform(0, faults.plan.late))
    return await sender.deliver(url, envelope)


@applies("callback")
async def forged(
    _faults: ActiveFaults, sender: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """A forged callback with another task and result arrives first, at the right URL."""
    await sender.deliver(url, _forged_envelope())
    return await sender.deliver(url, envelope)


@applies("callback")
async def misdirected(
    _faults: ActiveFaults, sender: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """A forged callback arrives first, at a URL whose token is wrong."""
    where = urlsplit(url)
    guessed = where.path.rpartition("/")[0] + "/guessed"
    await sender.deliver(urlunsplit(where._replace(path=guessed)), _forged_envelope())
    return await sender.deliver(url, envelope)


def _forged_envelope() -> JsonObject:
    result = json.dumps({"resultUrls": ["file:///etc/hostname"]})
    data = {"taskId": "task_ffffffffffffffff", "state": "success", "resultJson": result}
    return {"code": 200, "message": "success", "data": data}
