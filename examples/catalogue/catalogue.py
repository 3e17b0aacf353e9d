"""A shop's catalogue in three styles, from its CSV into a bucket.

    python examples/catalogue/catalogue.py s3://shop/restyled

The CSV is as the shop exports it, with its own column names. Two of the styles come with the
package; the third, in `styles.yaml`, is the shop's own and uses columns of the CSV.
"""

import asyncio
import json
import sys
from pathlib import Path

import fsspec

from prefect_flux_kontext.flows import style_transfer_batch

HERE = Path(__file__).parent


def main(output: str) -> int:
    """Restyle the catalogue, and print where the images of each product are."""
    summary = asyncio.run(
        style_transfer_batch(
            HERE / "products.csv",
            output,
            columns={"id": "sku", "image": "photo"},
            styles=["watercolour", "poster", str(HERE / "styles.yaml")],
            output_names="{category}/{id}-{style}.{ext}",
            budget_usd=5,
        )
    )
    print(summary)
    with fsspec.open(f"{output}/results.jsonl", "rt") as results:
        for line in results:
            row = json.loads(line)
            print(f"{row['id']:<10}{row['style']:<14}{row.get('uri') or row['message']}")
    return 0 if summary.complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
