"""An upload: a manifest is put into the bucket, and announced when it is there.

    python examples/upload/upload.py summer "in the light of a summer evening"

Announced last: whoever is told of it finds it whole.
"""

import asyncio
import sys

import fsspec

from prefect_flux_kontext import announce_manifest

PHOTOS = ("coffee.webp", "rocket.jpg")


def main(order: str, wish: str) -> None:
    """Put the manifest of an order into the bucket, and tell Prefect of it."""
    manifest = f"s3://shop/orders/{order}.csv"
    rows = [f"{number},s3://shop/photos/{photo}" for number, photo in enumerate(PHOTOS, 1)]
    with fsspec.open(manifest, "wt") as file:
        file.write("\n".join(["id,image", *rows, ""]))
    output = f"s3://shop/delivered/{order}"
    asyncio.run(announce_manifest(manifest, output, {"wish": wish}))
    print(f"Announced {manifest}; its pictures will be in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
