"""Result images, rendered when a client first asks for them."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from prefect_flux_kontext.sandbox.painting import choose_style, paint
from prefect_flux_kontext.sandbox.references import SharedCache

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.references import References
    from prefect_flux_kontext.sandbox.tasks import Task

_CACHE_BYTES = 64 * 1024 * 1024


class ResultRenderer:
    """Renders result images in threads and caches a bounded number of bytes of them."""

    def __init__(self, references: References, long_edge: int) -> None:
        self._references = references
        self._long_edge = long_edge
        self._cache = SharedCache[bytes](_CACHE_BYTES, len)
        # More threads than processors would only compete with the event loop.
        self._render_slots = asyncio.Semaphore(os.cpu_count() or 1)

    async def render(self, task: Task) -> bytes:
        """Return the encoded result image of a task.

        Raises:
            BadReferenceError: The reference left the cache and can no longer be fetched.
        """
        prompt, ratio, kind = task.input.prompt, task.input.aspect_ratio, task.input.output_format
        style, content, subject = choose_style(prompt), None, prompt.encode()
        if task.input.image_urls:
            content, subject = await self._references.get(task.input.image_urls[0], task.base_url)

        async def render() -> bytes:
            arguments = content, prompt, style, ratio, kind, self._long_edge
            async with self._render_slots:
                return await asyncio.to_thread(paint, *arguments)

        return await self._cache.get((subject, style, ratio, kind), render)

    def clear(self) -> None:
        """Drop all cached images."""
        self._cache.clear()
