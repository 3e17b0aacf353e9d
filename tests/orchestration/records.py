"""Reading the events, artifacts and logs of a flow run from the Prefect server."""

import anyio
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from tests.orchestration.conftest import flush_to_prefect

OURS = ("flux-kontext.", "prefect.asset.")


async def post(path, body):
    async with get_client() as client:
        reply = await client._client.post(path, json=body)
        reply.raise_for_status()
        return reply.json()


async def read_all_events(flow_run_id):
    """Return the events about a flow run, or in its context, the oldest first."""
    related = {"id": [f"prefect.flow-run.{flow_run_id}"]}
    found = []
    page = await post("/events/filter", {"filter": {"any_resource": related}, "limit": 50})
    while page["events"]:
        found += page["events"]
        if not page["next_page"]:
            break
        async with get_client() as client:
            page = (await client._client.get(page["next_page"])).json()
    return sorted(found, key=lambda event: event["occurred"])


async def read_our_events(flow_run_id, *names):
    """Wait for events of the names, and return all of our events about a flow run."""
    await anyio.to_thread.run_sync(flush_to_prefect)
    for _ in range(300):
        found = [e for e in await read_all_events(flow_run_id) if e["event"].startswith(OURS)]
        if {event["event"] for event in found} >= set(names):
            return found
        await anyio.sleep(0.1)
    raise AssertionError(f"only {[event['event'] for event in found]}")


async def read_artifacts(flow_run_id):
    """Return the artifacts of a flow run, by type."""
    async with get_client() as client:
        found = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    return {artifact.type: artifact for artifact in found if artifact.type != "result"}


async def read_logs(flow_run_id):
    """Return the log messages of a flow run."""
    await anyio.to_thread.run_sync(flush_to_prefect)
    body = {"logs": {"flow_run_id": {"any_": [str(flow_run_id)]}}, "limit": 200}
    return [line["message"] for line in await post("/logs/filter", body)]
