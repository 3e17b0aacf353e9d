"""Theatre posters from text alone: a line of JSON for each play, and a style for all of them.

    python examples/posters/posters.py posters

The style's prompt is a template over the fields of a line, and the line's own `prompt` is one of
them. A line without a field that it needs is refused before anything is paid.
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
