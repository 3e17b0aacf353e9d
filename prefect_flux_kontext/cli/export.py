"""`flux-kontext export`: copy images elsewhere, as files or as a data set."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.cli.arguments import (
    add_json_argument,
    add_output_argument,
    open_output_argument,
    parse_count,
)
from prefect_flux_kontext.cli.display import print_json, print_text

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    export = commands.add_parser(
        "export",
        help="Copy the images of an output, as files or as a data set",
        description="Copy the stored images of OUTPUT to TARGET: as files with their lines of the "
        "result manifest, or as shards with image, reference, prompt, parameters and verdict of "
        "each row. Sends no request to the service; references are read again.",
    )
    add_output_argument(export)
    export.add_argument("target", metavar="TARGET", help="folder or prefix for the copies")
    export.add_argument(
        "--kept", action="store_true", help="only images whose verdict is keep (see `watch`)"
    )
    export.add_argument(
        "--format",
        choices=("files", "webdataset", "parquet"),
        default="files",
        help="format of the copies (default: files)",
    )
    export.add_argument(
        "--shard-mb",
        type=parse_count,
        default=500,
        metavar="MB",
        help="size of a shard (default: 500)",
    )
    add_json_argument(export)
    export.set_defaults(func=_export)


def _export(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.report.export import export_output
    from prefect_flux_kontext.settings import FluxKontextSettings

    target = open_output_argument(options.target)
    counts = asyncio.run(
        export_output(
            options.output,
            target,
            options.format,
            only_kept=options.kept,
            shard_bytes=options.shard_mb * 1_000_000,
            base_url=FluxKontextSettings().base_url,
        )
    )
    if options.json:
        print_json({"target": str(target), **counts})
    else:
        shards = f" in {counts['shards']:,} shards" if counts["shards"] else ""
        print_text(f"{counts['rows']:,} images copied{shards} to {target}")
        for name, text in (
            ("without_before", "without their reference, which cannot be read"),
            ("missing", "stored images are missing in the output and left out"),
        ):
            if counts[name]:
                print_text(f"{counts[name]:,} {text}")
    return 1 if counts["missing"] else 0
