"""What is told to Prefect's event feed: a few events a batch, none for an image.

All are named `flux-kontext.…`, and their resource is the output: its labels can be matched by
triggers, which cannot look into payloads. Prefect adds the flow run, its flow and its deployment
as related resources. Nothing here fails or delays a batch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from prefect.events import emit_event, get_events_client
from prefect.events.schemas.events import Event, Resource
from prefect.settings import PREFECT_API_URL

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.references.identity import url_identity

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
"""Prefect's own name: what `@materialize` emits, without the task run that it costs."""

_ROWS_TOLD = 20


def emit(event: str, output: str, payload: dict[str, Any], **labels: str) -> None:
    """Emit an event about an output; an event that cannot be emitted is no event.

    Args:
        event: Its name.
        output: The batch's output, as a URI.
        payload: What is worth knowing; JSON.
        **labels: What triggers may match, as `flux-kontext.<label>`.
    """
    named = {f"flux-kontext.{name}": value for name, value in labels.items()}
    _emit(event, _resource(output) | named, payload)


async def emit_and_flush(event: str, output: str, payload: dict[str, Any]) -> None:
    """Like `tell`, and sure that the event has reached Prefect; for processes outside of a flow.

    Raises:
        ConfigurationError: Prefect's API is not set or does not answer.
    """
    told = Event(event=event, resource=Resource(_resource(output)), payload=payload)
    await _send(told, f"event {event}")


def _resource(output: str) -> dict[str, str]:
    return {
        "prefect.resource.id": f"flux-kontext.output.{output}",
        "prefect.resource.name": output,
        "flux-kontext.output": output,
    }


def emit_asset(key: str, payload: dict[str, Any]) -> None:
    """Emit that the images of an output have changed, as one asset."""
    _emit(ASSET_STORED, {"prefect.resource.id": key, "prefect.resource.name": key}, payload)


def _emit(event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
    try:
        emit_event(event, resource, payload=payload)
    except Exception as error:  # noqa: BLE001 - whatever it is, the batch goes on
        logger.debug("The event %s was not emitted: %s", event, error)


def counts(summary: BatchSummary) -> dict[str, Any]:
    """What became of rows, as numbers for a payload."""
    return summary.model_dump(mode="json", exclude={"output", "failures"})


def describe_rows(rows: list[RowOutcome]) -> list[dict[str, Any]]:
    """The first twenty rows that are not stored, for a payload."""
    told = {"id", "line", "key", "state", "reason", "message", "task_id"}
    return [row.model_dump(mode="json", include=told) for row in rows[:_ROWS_TOLD]]


def emit_manifest_arrived(manifest: str, output: str | None = None, **payload: Any) -> None:
    """Tell Prefect that a manifest is there, so that a deployment with that trigger runs it.

    Example:
        ```python
        emit_manifest_arrived("s3://shop/new.csv", output="s3://shop/restyled", season="summer")
        ```

    Args:
        manifest: Its URL or path, without signature or password: Prefect keeps events.
        output: Where its images are to go.
        **payload: Whatever else the trigger's parameters may use.

    Raises:
        ConfigurationError: The URL holds a secret.
    """
    event = _arrival(manifest, output, payload)
    _emit(event.event, dict(event.resource), event.payload)


async def announce_manifest(manifest: str, output: str | None, payload: dict[str, Any]) -> None:
    """Like `emit_manifest_arrived`, and sure that the event has reached Prefect.

    Raises:
        ConfigurationError: The URL holds a secret, or Prefect's API does not answer.
    """
    await _send(_arrival(manifest, output, payload), "announcement")


async def _send(event: Event, what: str) -> None:
    url = require_api_url()
    try:
        async with get_events_client(reconnection_attempts=0, checkpoint_every=1) as client:
            await client.emit(event)
    except Exception as error:
        raise ConfigurationError(
            f"The {what} did not reach Prefect at {url}: {type(error).__name__}: {error}"
        ) from error


def require_api_url() -> str:
    """The address of Prefect's API, for what is of no use without.

    Raises:
        ConfigurationError: None is set. Prefect would start a server of its own, which nobody
            else listens to.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise ConfigurationError("Set PREFECT_API_URL to the address of Prefect's API.")
    return str(url)


def _arrival(manifest: str, output: str | None, payload: dict[str, Any]) -> Event:
    where = {"manifest": manifest, "output": output}
    for what, location in where.items():
        if location and "://" in location and _holds_secret(location):
            raise ConfigurationError(
                f"The {what}'s URL holds a signature or a password, and Prefect keeps events. "
                "Name it without, and give the worker the right to read it."
            )
    # Who runs it has another working directory.
    absolute = {
        name: location if location is None or "://" in location else str(Path(location).absolute())
        for name, location in where.items()
    }
    resource = {
        "prefect.resource.id": f"flux-kontext.manifest.{absolute['manifest']}",
        "prefect.resource.name": str(absolute["manifest"]),
        **{
            f"flux-kontext.{name}": location
            for name, location in absolute.items()
            if location is not None
        },
    }
    told = {**payload, **{name: value for name, value in absolute.items() if value is not None}}
    return Event(event=MANIFEST_ARRIVED, resource=Resource(resource), payload=told)


def _holds_secret(url: str) -> bool:
    parts, bare = urlsplit(url), urlsplit(url_identity(url))
    given, kept = (parse_qsl(told.query, keep_blank_values=True) for told in (parts, bare))
    return "@" in parts.netloc or len(kept) < len(given)
