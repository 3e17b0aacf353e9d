"""The events that are emitted to Prefect: a few for each batch, none for each image.

Their names start with `flux-kontext.`, and their resource is the output. Triggers can match the
labels of the resource, but not the payload. Prefect adds the flow run, its flow and its deployment
as related resources. `emit` never fails or delays a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext
from prefect.events import emit_event, get_events_client
from prefect.events.schemas.events import Event, Resource
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from pydantic import ValidationError

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.redaction import redact_url

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.summary import BatchSummary, RowOutcome

logger = logging.getLogger(__name__)

BATCH_STARTED = "flux-kontext.batch.started"
WAVE_FINISHED = "flux-kontext.wave.finished"
ROWS_FAILED = "flux-kontext.rows.failed"
SPEND_ABOVE = "flux-kontext.batch.spend-above"
BATCH_SUSPENDED = "flux-kontext.batch.suspended"
BATCH_FINISHED = "flux-kontext.batch.finished"
RESULTS_EXPIRING = "flux-kontext.results.expiring"
RESULTS_READY = "flux-kontext.results.ready"
MANIFEST_ARRIVED = "flux-kontext.manifest.arrived"
ASSET_STORED = "prefect.asset.materialization.succeeded"
ASSET_FAILED = "prefect.asset.materialization.failed"

_MAX_ROWS_IN_PAYLOAD = 20


def emit(event: str, output: str, payload: dict[str, Any], **labels: str) -> None:
    """Emit an event about an output. Failures to emit are logged and ignored."""
    named = {f"flux-kontext.{name}": value for name, value in labels.items()}
    _emit(event, _build_resource(output) | named, payload)


async def emit_and_flush(event: str, output: str, payload: dict[str, Any]) -> None:
    """Emit an event about an output, and wait until Prefect has it. For use outside of a flow.

    Raises:
        ConfigurationError: The address of Prefect's API is not set, or it does not answer.
    """
    resource = Resource(_build_resource(output))
    await _send(Event(event=event, resource=resource, payload=payload), f"event {event}")


def emit_asset(
    output: str,
    made_from: Iterable[str],
    properties: AssetProperties,
    payload: dict[str, Any],
    *,
    failed: bool,
) -> None:
    """Emit that the images of an output were made, or could not be, as one asset.

    The events are those of a task with `@materialize`, without a task run for them.
    """
    asset = _build_asset(output, properties)
    if asset is None:
        return
    sources = {found for location in made_from if (found := _build_asset(location))} - {asset}
    context = AssetContext(
        downstream_assets={asset},
        direct_asset_dependencies=sources,
        materialized_by="prefect-flux-kontext",
        materialization_metadata={asset.key: payload},
    )
    try:
        context.emit_events(Failed() if failed else Completed())
    except Exception as error:  # noqa: BLE001 - an event never fails a batch
        logger.debug("The asset %s was not emitted: %s", asset.key, error)


def build_counts(summary: BatchSummary) -> dict[str, Any]:
    """Build the part of a payload that counts the rows of a summary."""
    counts = summary.model_dump(mode="json", exclude={"output", "failures", "spent"})
    return {**counts, "spent_usd": summary.spent}


def describe_rows(rows: list[RowOutcome]) -> list[dict[str, Any]]:
    """Build the part of a payload that describes the first twenty rows that are not stored."""
    fields = {"id", "line", "key", "state", "reason", "message", "task_id"}
    return [row.model_dump(mode="json", include=fields) for row in rows[:_MAX_ROWS_IN_PAYLOAD]]


def emit_manifest_arrived(manifest: str, output: str | None = None, **payload: Any) -> None:
    """Emit that a manifest has arrived, so that a deployment with that trigger runs it.

    Example:
        ```python
        emit_manifest_arrived("s3://shop/new.csv", output="s3://shop/restyled", season="summer")
        ```

    Args:
        manifest: Its URL or path, without a signature or password, because Prefect stores events.
        output: The output to store its images in.
        **payload: Further values that the parameters of the trigger may use.

    Raises:
        ConfigurationError: The URL contains a secret.
    """
    event = _build_arrival(manifest, output, payload)
    _emit(event.event, dict(event.resource), event.payload)


async def announce_manifest(manifest: str, output: str | None, payload: dict[str, Any]) -> None:
    """Emit as `emit_manifest_arrived`, and wait until Prefect has the event.

    Raises:
        ConfigurationError: The URL contains a secret, or Prefect's API does not answer.
    """
    await _send(_build_arrival(manifest, output, payload), "announcement")


def require_api_url() -> str:
    """Return the address of Prefect's API.

    Raises:
        ConfigurationError: PREFECT_API_URL is not set. Prefect would start a temporary server of
            its own, to which no other process connects.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise ConfigurationError("Set PREFECT_API_URL to the address of Prefect's API.")
    return str(url)


def _build_resource(output: str) -> dict[str, str]:
    return {
        "prefect.resource.id": f"flux-kontext.output.{output}",
        "prefect.resource.name": output,
        "flux-kontext.output": output,
    }


def _build_asset(location: str, properties: AssetProperties | None = None) -> Asset | None:
    """Return a URL or absolute path as an asset, or None if Prefect does not take it as a key."""
    url = redact_url(location) if "://" in location else f"file://{location}"
    try:
        return Asset(key=url, properties=properties)
    except ValidationError:
        return None


def _emit(event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
    try:
        emit_event(event, resource, payload=payload)
    except Exception as error:  # noqa: BLE001 - an event never fails a batch
        logger.debug("The event %s was not emitted: %s", event, error)


async def _send(event: Event, what: str) -> None:
    url = require_api_url()
    try:
        async with get_events_client(reconnection_attempts=0, checkpoint_every=1) as client:
            await client.emit(event)
    except Exception as error:
        raise ConfigurationError(
            f"The {what} did not reach Prefect at {url}: {type(error).__name__}: {error}"
        ) from error


def _build_arrival(manifest: str, output: str | None, payload: dict[str, Any]) -> Event:
    locations = {"manifest": manifest, "output": output}
    for what, location in locations.items():
        if location and "://" in location and redact_url(location) != location:
            raise ConfigurationError(
                f"The URL of the {what} contains a signature or a password, and Prefect stores "
                "events. Give the URL without it, and give the worker the right to read it."
            )
    # The worker that runs the manifest has another working directory.
    absolute = {
        name: location if "://" in location else str(Path(location).absolute())
        for name, location in locations.items()
        if location is not None
    }
    resource = {
        "prefect.resource.id": f"flux-kontext.manifest.{absolute['manifest']}",
        "prefect.resource.name": absolute["manifest"],
        **{f"flux-kontext.{name}": location for name, location in absolute.items()},
    }
    return Event(
        event=MANIFEST_ARRIVED, resource=Resource(resource), payload={**payload, **absolute}
    )
