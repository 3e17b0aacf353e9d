"""Faults of callbacks."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from prefect_flux_kontext.sandbox.contract import success
from prefect_flux_kontext.sandbox.faults.registry import FAULTS

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.contract import JsonObject
    from prefect_flux_kontext.sandbox.faults.injector import ActiveFaults
    from prefect_flux_kontext.sandbox.lifecycle import CallbackSender

FAULTS["callback"] = {
    "lost": "It is never delivered",
    "doubled": "It is delivered twice",
    "late": "It is delivered `late` seconds late",
    "overtaken": "It is delivered up to `late` seconds late, so others arrive first",
    "forged": "A forged callback with another task and result arrives first, at the right URL",
    "misdirected": "A forged callback arrives first, at a URL whose token is wrong",
}

_FORGED_ENVELOPE = success(
    {
        "taskId": "task_ffffffffffffffff",
        "state": "success",
        "resultJson": json.dumps({"resultUrls": ["file:///etc/hostname"]}),
    }
)


async def deliver(
    faults: ActiveFaults, sender: CallbackSender, url: str, envelope: JsonObject
) -> bool:
    """Deliver a callback under the active faults; return whether it arrived."""
    arrived = False
    fault, _ = faults.applies("callback")
    match fault:
        case "lost":
            return False
        case "doubled":
            arrived = await sender.deliver(url, envelope)
        case "late":
            await asyncio.sleep(faults.plan.late)
        case "overtaken":
            # Seeded with the URL, which no other callback has.
            await asyncio.sleep(random.Random(url).uniform(0, faults.plan.late))
        case "forged":
            await sender.deliver(url, _FORGED_ENVELOPE)
        case "misdirected":
            where = urlsplit(url)
            guessed = where.path.rpartition("/")[0] + "/guessed"
            await sender.deliver(urlunsplit(where._replace(path=guessed)), _FORGED_ENVELOPE)
    return await sender.deliver(url, envelope) or arrived
