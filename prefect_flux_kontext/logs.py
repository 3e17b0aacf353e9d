"""What the core logs, in the logs of the flow run."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

_CORE = logging.getLogger("prefect_flux_kontext")


class _IntoTheRun(logging.Handler):
    """Hands a record of the core's to the logger of the run in whose context it was made."""

    batches = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            run = get_run_logger()
        except MissingContextError:
            return
        if run.isEnabledFor(record.levelno):
            run.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


_handler = _IntoTheRun()


@contextmanager
def core_logs() -> Iterator[None]:
    """Log what the core says in the flow run while the block runs, and nowhere else.

    Where the core's logger has handlers already (PREFECT_LOGGING_EXTRA_LOGGERS), it keeps to
    them.
    """
    if _CORE.handlers and not _handler.batches:
        yield
        return
    if not _handler.batches:
        _CORE.addHandler(_handler)
        _CORE.setLevel(get_run_logger().getEffectiveLevel())
        _CORE.propagate = False
    _handler.batches += 1
    try:
        yield
    finally:
        _handler.batches -= 1
        if not _handler.batches:
            _CORE.removeHandler(_handler)
            _CORE.setLevel(logging.NOTSET)
            _CORE.propagate = True
