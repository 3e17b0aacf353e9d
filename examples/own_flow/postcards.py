"""A flow of one's own around the three tasks, with a branch for what the service will not draw.

    python examples/own_flow/postcards.py postcards

Guests have said what they want on their postcard. A wish against the content rules is not drawn
and not tried again: a person gets it to read, and the guest gets the motif of the house.
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


async def drawn(guest: str, wish: str, output: str) -> str:
    """Draw one wish, and say where it is; from the submit on it is billed.

    Raises:
        GenerationFailedError: The service has not drawn it; `code` says why.
    """
    request = GenerationRequest(prompt=wish, aspect_ratio="4:3", output_format="png")
    task = await submit_generation(request)
    result = await wait_for_generation(task)
    images = await persist_images(result, output, name=guest)
    return images[0].uri


@flow(log_prints=True)
async def postcards(wishes: dict[str, str], output: str) -> dict[str, str]:
    """Draw all wishes side by side, and say for each guest where the postcard is."""
    refused = []

    async def postcard(guest: str, wish: str) -> str:
        try:
            return await drawn(guest, wish, output)
        except GenerationFailedError as error:
            if error.code != "CONTENT_VIOLATION":
                raise
            refused.append({"guest": guest, "wish": wish, "said": error.message})
            return await drawn(guest, MOTIF, output)

    stored = await asyncio.gather(*(postcard(*asked) for asked in wishes.items()))
    if refused:
        await acreate_table_artifact(refused, "wishes-to-read", "Not drawn: see what was meant.")
        print(f"For a person to read: {', '.join(wish['guest'] for wish in refused)}.")
    return dict(zip(wishes, stored, strict=True))


if __name__ == "__main__":
    for guest, uri in asyncio.run(postcards(json.loads(WISHES.read_text()), sys.argv[1])).items():
        print(f"{guest:<10}{uri}")
