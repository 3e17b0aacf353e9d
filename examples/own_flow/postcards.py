"""Your own flow with the three tasks, and a branch for prompts that the service refuses to draw.

    python examples/own_flow/postcards.py postcards

Hotel guests have said what they want on their postcard. A wish that violates the content rules is
not retried: an artifact lists it for review, and the guest gets the motif of the hotel.
"""

import asyncio
import json
import sys
from pathlib import Path

from prefect import flow
from prefect.artifacts import acreate_table_artifact

from prefect_flux_kontext import (
    GenerationRequest,
    persist_images,
    submit_generation,
    wait_for_generation,
)
from prefect_flux_kontext.errors import GenerationFailedError

WISHES = Path(__file__).parent / "wishes.json"
MOTIF = "The hotel by the sea at dusk, as a hand-coloured lithograph"


async def draw_postcard(guest: str, wish: str, output: str) -> str:
    """Draw one wish and return the URI of the image. It is billed from the submit on.

    Raises:
        GenerationFailedError: The generation failed; `code` says why.
    """
    request = GenerationRequest(prompt=wish, aspect_ratio="4:3", output_format="png")
    task = await submit_generation(request)
    result = await wait_for_generation(task)
    images = await persist_images(result, output, name=guest)
    return images[0].uri


@flow(log_prints=True)
async def postcards(wishes: dict[str, str], output: str) -> dict[str, str]:
    """Draw all wishes concurrently, and return the URI of each guest's postcard."""
    rejected = []

    async def draw_or_replace(guest: str, wish: str) -> str:
        try:
            return await draw_postcard(guest, wish, output)
        except GenerationFailedError as error:
            if error.code != "CONTENT_VIOLATION":
                raise
            rejected.append({"guest": guest, "wish": wish, "message": error.message})
            return await draw_postcard(guest, MOTIF, output)

    stored = await asyncio.gather(*(draw_or_replace(*wish) for wish in wishes.items()))
    if rejected:
        title = "Wishes that violate the content rules"
        await acreate_table_artifact(rejected, "wishes-to-review", title)
        print(f"Wishes to review, of guests: {', '.join(wish['guest'] for wish in rejected)}.")
    return dict(zip(wishes, stored, strict=True))


if __name__ == "__main__":
    for guest, uri in asyncio.run(postcards(json.loads(WISHES.read_text()), sys.argv[1])).items():
        print(f"{guest:<10}{uri}")
