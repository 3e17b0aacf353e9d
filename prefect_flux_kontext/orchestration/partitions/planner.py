"""Planning the partitions of a batch, before anything is paid."""

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
from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition
from prefect_flux_kontext.orchestration.partitions.leases import Share, read_account_limit
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.styles.styles import is_style_file

if TYPE_CHECKING:
    from prefect_flux_kontext.credentials import FluxKontextCredentials

DEFAULT_PARTITION_DEPLOYMENT = "style-transfer-partition/partition-of-batch"


@dataclass(frozen=True)
class PartitionPlan:
    """The plan for running a batch in partitions.

    Attributes:
        partitions: The number of partitions.
        share: The share of the account that each leases.
        deployment: The name of the deployment that runs them.
        parameters: The parameters that each gets from the batch, as JSON.
    """

    partitions: int
    share: Share
    deployment: str
    parameters: dict[str, Any]


async def plan_partitions(
    partitions: int, deployment: str, account: FluxKontextCredentials, wait: str
) -> PartitionPlan:
    """Check that the current batch can run in partitions, and plan them.

    Raises:
        ConfigurationError: It cannot run in partitions; the message says why.
    """
    if wait != "poll":
        raise ConfigurationError(
            f'wait="{wait}" is not possible with partitions. Use wait="poll", or partitions=1.'
        )
    if FluxKontextSettings().callback_listen is not None:
        raise ConfigurationError(
            "Partitions cannot receive callbacks themselves. Unset FLUX_KONTEXT_CALLBACK_LISTEN "
            "and run a receiver: flux-kontext receive OUTPUT"
        )
    parameters = _collect_parameters()
    async with get_client() as client:
        try:
            await client.read_deployment_by_name(deployment)
        except (ObjectNotFound, ValueError):
            raise ConfigurationError(
                f"There is no deployment {deployment!r} to run partitions. Create it with "
                "`flux-kontext deploy MANIFEST --output OUTPUT`, or set "
                "partition_deployment to one of yours. Nothing was submitted."
            ) from None
    return PartitionPlan(
        partitions, await read_account_limit(account, partitions), deployment, parameters
    )


def _collect_parameters() -> dict[str, Any]:
    """Return the parameters of the current flow run that its partitions get too, as JSON."""
    context = FlowRunContext.get()
    own = (context.parameters if context is not None else None) or {}
    names: Any = style_transfer_partition.parameters.properties
    passed = {
        name: _convert_to_json(name, own[name])
        for name in names
        if name in own and name != "manifest"
    }
    passed["output"] = _make_absolute(passed["output"])
    if isinstance(own["manifest"], str):  # else `share_rows` adds what names it
        passed["manifest"] = _make_absolute(own["manifest"])
    styles = passed.get("styles")
    if styles is not None:
        named = [styles] if isinstance(styles, str) else styles
        passed["styles"] = [
            _make_absolute(name) if is_style_file(name) else name for name in named
        ]
    return passed


def _convert_to_json(name: str, value: Any) -> Any:
    if isinstance(value, Block):
        document = value._block_document_id  # noqa: SLF001 - Prefect has no public name
        if document is None:
            raise ConfigurationError(
                f"The {name} of a batch in partitions cannot be an unsaved Block, because each "
                "partition loads the Block. Save it and give its name."
            )
        return {"$ref": {"block_document_id": str(document)}}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _convert_to_json(key, item) for key, item in value.items()}
    if not isinstance(value, str | int | float | list | dict | None):
        raise ConfigurationError(
            f"The {name} of a batch in partitions cannot be {value!r:.80}, because it is sent to "
            "other machines. Give it as text."
        )
    return value


def _make_absolute(location: Any) -> Any:
    # The worker that runs a partition has another working directory.
    if not isinstance(location, str) or "://" in location or location.startswith("block:"):
        return location
    return str(Path(location).expanduser().absolute())
