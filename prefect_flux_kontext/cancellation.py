"""What a cancelled flow run leaves behind, told where people look for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.logging import get_logger

from prefect_flux_kontext.batch.session import ledger_store
from prefect_flux_kontext.batch.status import ledger_status
from prefect_flux_kontext.outputs import open_output

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State


async def tell_what_is_owed(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """After a cancellation, log what the ledger says is paid for and not stored."""
    given = flow_run.parameters
    output = await open_output(given["output"], given.get("storage_options"))
    status = await ledger_status(ledger_store(output))
    get_logger("prefect_flux_kontext").warning(
        "%s was cancelled. Paid for and not stored: %d rows; maybe paid for: %d. To collect them: "
        "flux-kontext collect %s",
        flow_run.name,
        len(status.outstanding),
        len(status.unknown),
        output,
    )
