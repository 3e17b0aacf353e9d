"""What the core logs, in the logs of the flow run."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_CORE = logging.getLogger("prefect_flux_kontext")


class _IntoTheRun(logging.Handler):
    """Hands a record of the core's to the logger of the run in whose context it was made."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            run = get_run_logger()
        except MissingContextError:
            return
        if run.isEnabledFor(record.levelno):
            run.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


@asynccontextmanager
async def core_logs() -> AsyncIterator[None]:
    """Log what the core says in the flow run while the block runs.

    Where the core's logger has handlers of its own (PREFECT_LOGGING_EXTRA_LOGGERS), it keeps to
    them.
    """
    if _CORE.handlers:
        yield
        return
    handler, level = _IntoTheRun(), _CORE.level
    _CORE.addHandler(handler)
    _CORE.setLevel(get_run_logger().getEffectiveLevel())
    try:
        yield
    finally:
        _CORE.removeHandler(handler)
        _CORE.setLevel(level)
