"""Automations as code: who is told when a batch fails, costs too much or loses results.

Triggers cannot compare numbers, so the flows say themselves when a sum is passed
(`alert_above_usd`) and when results will soon be gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.orchestration.events import RESULTS_EXPIRING, SPEND_ABOVE

if TYPE_CHECKING:
    from uuid import UUID

FLOWS = ["style-transfer", "style-transfer-batch", "collect-batch", "retry-failed"]
"""The names of our flows, under which their failures are found."""

_RUN = "{{ flow_run|ui_url }}"


async def create_automations(notify: str) -> list[str]:
    """Have people told through a notification Block; made again, they are only brought up to date.

    Args:
        notify: A saved notification Block, such as `slack-webhook/alerts`.

    Returns:
        The names of the automations.

    Raises:
        ConfigurationError: There is no such Block, or it cannot notify.
    """
    automations = _automations(await _block_id(notify))
    async with get_client() as client:
        for automation in automations:
            known = await client.read_automations_by_name(automation.name)
            if known:
                # Prefect sends what was set, so all has to be; off stays off.
                told = automation.model_dump(exclude={"owner_resource"})
                told["enabled"] = known[0].enabled
                await client.update_automation(known[0].id, AutomationCore.model_validate(told))
            else:
                await client.create_automation(automation)
    return [automation.name for automation in automations]


def _automations(block_id: UUID) -> list[AutomationCore]:
    def notification(subject: str, body: str) -> SendNotification:
        return SendNotification(block_document_id=block_id, subject=subject, body=body)

    return [
        AutomationCore(
            name="flux-kontext, a batch failed",
            description="A run of one of our flows failed, crashed or took too long.",
            trigger=EventTrigger(
                expect={
                    "prefect.flow-run.Failed",
                    "prefect.flow-run.Crashed",
                    "prefect.flow-run.TimedOut",
                },
                match_related={
                    "prefect.resource.role": "flow",
                    "prefect.resource.name": FLOWS,
                },
            ),
            actions=[
                notification(
                    "Flux Kontext: {{ flow.name }} is {{ flow_run.state.name }}",
                    f"{{{{ flow_run.state.message }}}}\n{_RUN}",
                )
            ],
        ),
        AutomationCore(
            name="flux-kontext, spend above",
            description="A batch has spent more than its alert_above_usd.",
            trigger=EventTrigger(expect={SPEND_ABOVE}),
            actions=[
                notification(
                    "Flux Kontext: ${{ event.payload.spent }} spent",
                    "More than ${{ event.payload.above }}, for {{ event.payload.output }}.\n"
                    f"{_RUN}",
                )
            ],
        ),
        AutomationCore(
            name="flux-kontext, results close to expiry",
            description="Results that are paid for and not stored will be gone in a few days.",
            trigger=EventTrigger(expect={RESULTS_EXPIRING}),
            actions=[
                notification(
                    "Flux Kontext: {{ event.payload.rows }} results will soon be gone",
                    "The first in {{ event.payload.days_left }} days. They are paid for; to store "
                    f"them: flux-kontext collect {{{{ event.payload.output }}}}\n{_RUN}",
                )
            ],
        ),
    ]


async def _block_id(notify: str) -> UUID:
    try:
        block: Any = await Block.aload(notify)
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"No saved Block {notify!r} (a type and a name, such as slack-webhook/alerts): {error}"
        ) from None
    block_id: UUID | None = block._block_document_id  # noqa: SLF001 - there is no other way
    if not isinstance(block, NotificationBlock) or block_id is None:
        raise ConfigurationError(f"The Block {notify} cannot notify anybody.")
    return block_id
