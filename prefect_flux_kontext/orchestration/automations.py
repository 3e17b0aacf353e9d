"""Automations as code: notify people when a batch fails, costs too much or loses results.

Triggers cannot compare numbers, so the flows emit an event of their own when the spending passes
a limit (`alert_above_usd`) and when results are about to expire.
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

FLOW_NAMES = ["style-transfer", "style-transfer-batch", "collect-batch", "retry-failed"]
"""The flows whose failures are notified."""

_RUN_URL = "{{ flow_run|ui_url }}"


async def create_automations(notify: str) -> list[str]:
    """Create the automations that notify people, or update them if they exist.

    An automation that a person has switched off stays off. Notifications go to the saved Block
    `notify`, such as `slack-webhook/alerts`. The names of the automations are returned.

    Raises:
        ConfigurationError: The Block does not exist or cannot send notifications.
    """
    automations = _build_automations(await _load_block_id(notify))
    async with get_client() as client:
        for automation in automations:
            existing = await client.read_automations_by_name(automation.name)
            if existing:
                # Prefect sends only fields that were set, so all are set here.
                fields = automation.model_dump(exclude={"owner_resource"})
                fields["enabled"] = existing[0].enabled
                update = AutomationCore.model_validate(fields)
                await client.update_automation(existing[0].id, update)
            else:
                await client.create_automation(automation)
    return [automation.name for automation in automations]


def _build_automations(block_id: UUID) -> list[AutomationCore]:
    def automation(
        name: str, description: str, trigger: EventTrigger, subject: str, body: str
    ) -> AutomationCore:
        notification = SendNotification(
            block_document_id=block_id,
            subject=f"Flux Kontext: {subject}",
            body=f"{body}\n{_RUN_URL}",
        )
        return AutomationCore(
            name=f"flux-kontext, {name}",
            description=description,
            trigger=trigger,
            actions=[notification],
        )

    ends = {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")}
    flows = {"prefect.resource.role": "flow", "prefect.resource.name": FLOW_NAMES}
    return [
        automation(
            "a batch failed",
            "A run of a Flux Kontext flow failed, crashed or timed out.",
            EventTrigger(expect=ends, match_related=flows),
            "{{ flow.name }} is {{ flow_run.state.name }}",
            "{{ flow_run.state.message }}",
        ),
        automation(
            "spend above",
            "A batch has spent more than its alert_above_usd.",
            EventTrigger(expect={SPEND_ABOVE}),
            "${{ event.payload.spent_usd }} spent",
            "The batch has spent more than ${{ event.payload.above_usd }}. Output: "
            "{{ event.payload.output }}",
        ),
        automation(
            "results close to expiry",
            "Results that are paid for and not stored expire in a few days.",
            EventTrigger(expect={RESULTS_EXPIRING}),
            "{{ event.payload.rows }} results expire soon",
            "The first expires in {{ event.payload.days_left }} days. They are paid for. "
            "Store them: flux-kontext collect {{ event.payload.output }}",
        ),
    ]


async def _load_block_id(notify: str) -> UUID:
    try:
        block: Any = await Block.aload(notify)
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"No saved Block {notify!r}: give its type and name, such as slack-webhook/alerts. "
            f"Prefect: {error}"
        ) from None
    block_id: UUID | None = block._block_document_id  # noqa: SLF001 - Prefect has no public name
    if not isinstance(block, NotificationBlock) or block_id is None:
        raise ConfigurationError(
            f"The Block {notify} cannot send notifications. Give a notification Block, such as "
            "slack-webhook/alerts."
        )
    return block_id
