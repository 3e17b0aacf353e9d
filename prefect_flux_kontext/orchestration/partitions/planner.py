"""How a batch is cut into partitions, and whether it can be, before anything is paid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.tables import Table
from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition
from prefect_flux_kontext.orchestration.partitions.leases import Share, read_account_limit
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.styles.styles import is_style_file

if TYPE_CHECKING:
    from prefect_flux_kontext.credentials import FluxKontextCredentials


@dataclass(frozen=True)
class PartitionPlan:
    """How a batch is cut into partitions.

    Attributes:
        partitions: How many.
        share: What each leases.
        deployment: The name of the deployment that runs them.
        parameters: What each is told, as JSON.
    """

    partitions: int
    share: Share
    deployment: str
    parameters: dict[str, Any]


async def plan_partitions(
    partitions: int, deployment: str, account: FluxKontextCredentials, wait: str
) -> PartitionPlan:
    """Find out before anything is paid whether the present batch can be run in partitions.

    Raises:
        ConfigurationError: It cannot; the message says why.
    """
    if wait != "poll":
        raise ConfigurationError(
            f'A batch in partitions waits for its results: wait="{wait}" is for one partition.'
        )
    if FluxKontextSettings().callback_listen is not None:
        raise ConfigurationError(
            "The partitions of a batch cannot each receive callbacks. Unset "
            "FLUX_KONTEXT_CALLBACK_LISTEN and run a receiver: flux-kontext receive OUTPUT"
        )
    parameters = _passed_on()
    async with get_client() as client:
        try:
            await client.read_deployment_by_name(deployment)
        except (ObjectNotFound, ValueError):
            raise ConfigurationError(
                f"There is no deployment {deployment!r} to run partitions. Deploy it from this "
                "package's prefect.yaml (prefect deploy --name partition-of-batch), or name yours "
                "as "
                "partition_deployment. Nothing was submitted."
            ) from None
    return PartitionPlan(
        partitions, await read_account_limit(account, partitions), deployment, parameters
    )


def _passed_on() -> dict[str, Any]:
    """The parameters of the present flow run that its partitions get as well, as JSON."""
    context = FlowRunContext.get()
    given = (context.parameters if context is not None else None) or {}
    names: Any = style_transfer_partition.parameters.properties
    told = {name: _as_json(name, given[name]) for name in names if name in given}
    told["output"] = _absolute(told["output"])
    told["manifest"] = _absolute(told["manifest"])
    styles = told.get("styles")
    if styles is not None:
        named = [styles] if isinstance(styles, str) else styles
        told["styles"] = [_absolute(name) if is_style_file(name) else name for name in named]
    return told


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, Block):
        document = value._block_document_id  # noqa: SLF001 - there is no other way
        if document is None:
            raise ConfigurationError(
                f"The {name} of a batch in partitions cannot be an unsaved Block: its partitions "
                "load it by itself. Save it, and give its name."
            )
        return {"$ref": {"block_document_id": str(document)}}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Table) or not isinstance(value, str | int | float | list | dict | None):
        raise ConfigurationError(
            f"The {name} of a batch in partitions is sent to other machines, so it cannot be "
            f"{value!r:.80}. Give it as text or, of a manifest, as a list of dicts."
        )
    return value


def _absolute(location: Any) -> Any:
    # Who runs a partition has another working directory.
    if not isinstance(location, str) or "://" in location or location.startswith("block:"):
        return location
    return str(Path(location).expanduser().absolute())
