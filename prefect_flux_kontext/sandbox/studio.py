"""Making result pictures when somebody first asks for them."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

from prefect_flux_kontext.sandbox.references import SharedCache
from prefect_flux_kontext.sandbox.restyle import paint, style_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect_flux_kontext.sandbox.references import References
    from prefect_flux_kontext.sandbox.tasks import Task

_CACHED_BYTES = 64 * 1024 * 1024


class Studio:
    """Paints in threads, a few at a time, and keeps a bounded number of bytes of pictures.

    The same reference, style and format give the same bytes, whichever task asks.

    Args:
        references: Where the reference images come from.
        long_edge: Pixels on the long edge of a picture.
    """

    def __init__(self, references: References, long_edge: int) -> None:
        self._references = references
        self._long_edge = long_edge
        self._pictures = SharedCache[bytes](_CACHED_BYTES, len)
        # More painters than processors would only take turns with the event loop.
        self._easels = asyncio.Semaphore(os.cpu_count() or 1)

    async def picture(self, task: Task) -> bytes:
        """The encoded result picture of a task.

        Raises:
            BadReferenceError: When the reference was let go and cannot be fetched any more.
        """
        wanted = task.input
        style = style_of(wanted.prompt)
        reference = None
        subject: bytes | str = wanted.prompt
        if wanted.image_urls:
            fetched = await self._references.get(wanted.image_urls[0], task.base_url)
            reference, subject = fetched.content, fetched.digest
        work = partial(
            paint,
            reference,
            wanted.prompt,
            style,
            aspect_ratio=wanted.aspect_ratio,
            output_format=wanted.output_format,
            long_edge=self._long_edge,
        )
        key = (subject, style, wanted.aspect_ratio, wanted.output_format)
        return await self._pictures.get(key, partial(self._paint, work))

    def forget(self) -> None:
        """Paint everything anew from now on."""
        self._pictures.clear()

    async def _paint(self, work: Callable[[], bytes]) -> bytes:
        async with self._easels:
            return await asyncio.to_thread(work)
