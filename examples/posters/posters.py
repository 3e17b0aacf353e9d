"""Theatre posters from text alone: one line of JSON for each play, and one style for all.

    python examples/posters/posters.py posters

The prompt of the style is a template over the fields of a line, including the line's `prompt`. A
line that lacks a required field is refused before anything is paid.
"""

import asyncio
import sys
from pathlib import Path

from prefect_flux_kontext.flows import style_transfer_batch

HERE = Path(__file__).parent


def main(output: str) -> int:
    """Make a poster for each play."""
    summary = asyncio.run(
        style_transfer_batch(
            HERE / "plays.jsonl",
            output,
            styles=str(HERE / "styles.yaml"),
            output_names="{season}/{id}.{ext}",
        )
    )
    print(summary)
    return 0 if summary.complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
