"""Upload a manifest to the bucket and announce it.

    python examples/upload/upload.py summer "in the light of a summer evening"

The announcement comes last, so that a flow run that it starts finds the complete manifest.
"""

import asyncio
import sys

import fsspec

from prefect_flux_kontext import announce_manifest

PHOTOS = ("coffee.webp", "rocket.jpg")


def main(order: str, wish: str) -> None:
    """Write the manifest of an order to the bucket, and announce it to Prefect."""
    manifest = f"s3://shop/orders/{order}.csv"
    rows = [f"{number},s3://shop/photos/{photo}" for number, photo in enumerate(PHOTOS, 1)]
    with fsspec.open(manifest, "wt") as file:
        file.write("\n".join(["id,image", *rows, ""]))
    output = f"s3://shop/delivered/{order}"
    asyncio.run(announce_manifest(manifest, output, {"wish": wish}))
    print(f"Announced {manifest}. Its images will be in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
