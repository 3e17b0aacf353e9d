"""`flux-kontext run MANIFEST OUTPUT`: a whole manifest, without Prefect."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from prefect_flux_kontext.batch.summary import BatchSummary

SOME_ROWS_FAILED = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "run",
        help="restyle every image of a manifest",
        description="Restyle every image of a CSV manifest and store the results. Exit status: "
        "0 all rows stored, 1 some rows failed, 2 the run could not start.",
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="CSV file, a path or fsspec URL")
    parser.add_argument("output", metavar="OUTPUT", help="folder or prefix to store to")
    parser.add_argument("--prompt", help="the prompt for rows that have none of their own")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run the batch and report it; see `flux-kontext run --help` for the exit status."""
    summary = asyncio.run(_run(options))
    for row in summary.failures:
        print(f"  line {row.line}, {row.id}: {row.message}")
    if summary.failed > len(summary.failures):
        print(f"  … and {summary.failed - len(summary.failures)} more")
    print(f"{summary}\n{summary.output}")
    return SOME_ROWS_FAILED if summary.stored < summary.rows else 0


async def _run(options: argparse.Namespace) -> BatchSummary:
    from prefect_flux_kontext.api.client import FluxKontextClient  # noqa: PLC0415
    from prefect_flux_kontext.batch.rows import row_runner  # noqa: PLC0415
    from prefect_flux_kontext.batch.waves import run_waves  # noqa: PLC0415
    from prefect_flux_kontext.cli.progress import shown  # noqa: PLC0415
    from prefect_flux_kontext.manifest.reading import Manifest  # noqa: PLC0415
    from prefect_flux_kontext.settings import FluxKontextSettings  # noqa: PLC0415
    from prefect_flux_kontext.storage import OutputFolder  # noqa: PLC0415

    settings = FluxKontextSettings()
    client = FluxKontextClient(
        settings.required_api_key(),
        base_url=settings.base_url,
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
    )
    manifest = Manifest(options.manifest, options.prompt)
    folder = OutputFolder(options.output)
    check = await asyncio.to_thread(manifest.check)
    await folder.check_writable()
    async with row_runner(client, folder, settings.cadence()) as runner:
        await client.check()
        async with shown(runner, check.rows):
            return await run_waves(
                manifest,
                runner,
                lambda wave: runner.run_wave(wave.rows),
                concurrent_tasks=settings.concurrent_tasks,
            )
