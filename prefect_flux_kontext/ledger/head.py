"""The head record of a ledger: its format, and the service and account that it belongs to.

The same row at another service or account is another payment, so a ledger is bound to one of
them. It is not bound to the API key, which may be replaced.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from prefect_flux_kontext.client.addresses import is_loopback_host
from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger.records import RECORD_VERSION, RecordVersion
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.store import RecordStore

FORMAT = 1
"""The format of ledgers that this release writes, and the newest that it reads."""

_RECORD = "format.json"

_THIS_MACHINE = "this machine"
"""The service of all loopback URLs: a sandbox has another port each time it is started."""


class Head(BaseModel):
    """The head record of a ledger.

    Attributes:
        format: Format of the ledger's records and of their places.
        oldest_reader: The oldest format whose readers read this ledger.
        service: Origin of the service at which its rows are paid.
        account: Label of the account that pays for them.
        created_at: When it was written.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: RecordVersion = RECORD_VERSION
    format: int = FORMAT
    oldest_reader: int = FORMAT
    service: str
    account: str
    created_at: AwareDatetime = Field(default_factory=utc_now)

    def __str__(self) -> str:
        return f"{self.service} (account {self.account!r})"


async def check_format(store: RecordStore) -> Head | None:
    """Return the head record of a ledger, or None if it has none yet.

    Raises:
        LedgerError: A newer release has written the ledger, or the record is damaged.
    """
    data = await store.read(_RECORD)
    if data is None:
        return None
    try:
        head = Head.model_validate_json(data)
    except ValidationError:
        raise LedgerError(
            f"The ledger record {store}/{_RECORD} is damaged. Write it again: flux-kontext rebind "
            "OUTPUT"
        ) from None
    _require_readable(store, head)
    return head


async def bind(store: RecordStore, base_url: str, account: str) -> None:
    """Bind a ledger to a service and an account, or check that it is bound to them.

    Args:
        store: The ledger's records.
        base_url: Base URL of the service.
        account: Label of the account.

    Raises:
        ConfigurationError: The ledger belongs to another service or account. Nothing was paid.
        LedgerError: The ledger cannot be read or written, or a newer release has written it.
    """
    wanted = Head(service=_find_service(base_url), account=account)
    head = await check_format(store)
    if head is None:
        if await store.create(_RECORD, _encode(wanted)):
            return
        head = await check_format(store) or wanted
    if (head.service, head.account) != (wanted.service, wanted.account):
        raise ConfigurationError(
            f"The ledger {store} belongs to {head}, but this run pays at {wanted}. Use another "
            "output, or the settings of that account. If it is the same account under another "
            "name: flux-kontext rebind OUTPUT"
        )


async def rebind(store: RecordStore, base_url: str, account: str) -> Head:
    """Bind a ledger to a service and an account, whatever it was bound to.

    Raises:
        LedgerError: The ledger cannot be written, or a newer release has written it.
    """
    with contextlib.suppress(ValidationError):  # of a missing or damaged record
        _require_readable(store, Head.model_validate_json(await store.read(_RECORD) or b""))
    head = Head(service=_find_service(base_url), account=account)
    await store.replace(_RECORD, _encode(head))
    return head


def _require_readable(store: RecordStore, head: Head) -> None:
    if head.oldest_reader > FORMAT:
        raise LedgerError(
            f"The ledger {store} has format {head.format} and this release reads format "
            f"{FORMAT}: upgrade prefect-flux-kontext."
        )


def _encode(head: Head) -> bytes:
    return head.model_dump_json().encode()


def _find_service(base_url: str) -> str:
    url = urlsplit(base_url.lower())
    return _THIS_MACHINE if is_loopback_host(url.hostname) else f"{url.scheme}://{url.netloc}"
