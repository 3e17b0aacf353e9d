"""Whole batches against a sandbox, without Prefect."""

from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

KEY = "key-of-the-tests"
QUICK = PollingCadence(initial_delay=0, interval=0.05, timeout=60)


async def run(sandbox, manifest, output, **options):
    """Run the manifest in one session and return the summary."""
    client = FluxKontextClient(KEY, base_url=sandbox.url)
    row_options = RowOptions(cadence=QUICK, **options)
    folder = OutputFolder(output)
    async with open_session(client, folder, row_options, FluxKontextSettings()) as session:
        return await run_batch(
            session, manifest.rows(), lambda wave: wave.run(), concurrent_tasks=100
        )
