"""Delivery of callbacks, repeated until the receiver answers 200."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

import httpx

from prefect_flux_kontext.sandbox.outbound import outbound_client

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.contract import JsonObject

REDELIVERY_DELAYS = (5.0, 15.0, 60.0)
"""Seconds before the second, third and last try."""

_CONNECTIONS = 1_000


class CallbackSender:
    """Posts envelopes to callback URLs.

    Args:
        timeout: Seconds a receiver has to answer with HTTP 200.
        delay_scale: Multiplies the delays between tries.
    """

    def __init__(self, timeout: float, delay_scale: float) -> None:
        self._timeout = timeout
        self._delays = [delay * delay_scale for delay in REDELIVERY_DELAYS]
        self._client = outbound_client(_CONNECTIONS)

    async def deliver(self, url: str, envelope: JsonObject) -> bool:
        """Post the envelope until the receiver accepts it; return whether it did."""
        for delay in self._delays:
            if await self._post(url, envelope):
                return True
            await asyncio.sleep(delay)
        return await self._post(url, envelope)

    async def _post(self, url: str, envelope: JsonObject) -> bool:
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream("POST", url, json=envelope) as response,
            ):
                # Only the status counts; the body is not read.
                return response.status_code == HTTPStatus.OK
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, ValueError):
            return False
