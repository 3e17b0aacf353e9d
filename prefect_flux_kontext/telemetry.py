"""OpenTelemetry metrics and one trace a row, for a process in which its SDK is set up.

Without the SDK (`prefect-flux-kontext[telemetry]`), OpenTelemetry is not imported: instruments do
nothing, and decorators return functions as they are. Attributes are modes, states and kinds of
errors, never prompts, ids, URLs or keys.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation

    _Function = Callable[_P, Coroutine[Any, Any, _T]]

_NAME = "flux_kontext"
_DURATION_BOUNDARIES_SECONDS = [1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 60, 90, 120, 180, 300, 600]


class _Nothing:
    """An instrument without an SDK."""

    def add(self, amount: float, attributes: dict[str, str] | None = None) -> None:
        """Do nothing."""


_accounts: weakref.WeakSet[Any] = weakref.WeakSet()
IS_ENABLED = all(map(importlib.util.find_spec, ("opentelemetry", "opentelemetry.sdk")))
COST: Any = _Nothing()
"""Counter of the dollars of accepted rows."""

if IS_ENABLED:
    from opentelemetry import metrics
    from opentelemetry.metrics import Observation
    from opentelemetry.trace import Status, StatusCode, get_current_span, get_tracer

    def _observe(count: Callable[[Any], float]) -> Callable[..., Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(sum(count(limiter) for limiter in _accounts))

        return observe

    _tracer = get_tracer(_NAME)
    _meter = metrics.get_meter(_NAME)
    COST = _meter.create_counter(f"{_NAME}.cost", "USD", "dollars of accepted rows")
    _requests = _meter.create_counter(f"{_NAME}.requests", "", "requests to the service")
    _rows = _meter.create_counter(f"{_NAME}.rows", "", "rows that ended, by state")
    _bytes = _meter.create_counter(f"{_NAME}.stored", "By", "bytes of stored images")
    _generation = _meter.create_histogram(
        f"{_NAME}.generation",
        "s",
        "time that the service took for an image",
        explicit_bucket_boundaries_advisory=_DURATION_BOUNDARIES_SECONDS,
    )
    _waiting = _meter.create_histogram(
        f"{_NAME}.waiting",
        "s",
        "time from a submit until its result was seen",
        explicit_bucket_boundaries_advisory=_DURATION_BOUNDARIES_SECONDS,
    )
    _outstanding = _meter.create_up_down_counter(
        f"{_NAME}.outstanding", "", "tasks that are paid for and not stored yet"
    )
    _meter.create_observable_gauge(
        f"{_NAME}.slots.used", [_observe(lambda limiter: limiter.running)], "", "tasks with a slot"
    )
    _meter.create_observable_gauge(
        f"{_NAME}.slots.limit", [_observe(lambda limiter: limiter.slots)], "", "slots there are"
    )


def observe_slots(limiter: object) -> None:
    """Measure the slots of an account, while its limiter exists."""
    _accounts.add(limiter)


def trace(name: str) -> Callable[[_Function[_P, _T]], _Function[_P, _T]]:
    """Decorate a coroutine function so that its calls are spans of the row's trace."""

    def decorate(function: _Function[_P, _T]) -> _Function[_P, _T]:
        if not IS_ENABLED:
            return function

        @functools.wraps(function)
        async def traced(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            # Messages of errors may hold URLs and ids, so only the kind of an error is recorded.
            with _tracer.start_as_current_span(
                f"{_NAME}.{name}", record_exception=False, set_status_on_exception=False
            ) as span:
                try:
                    return await function(*args, **kwargs)
                except Exception as error:
                    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                    raise

        return traced

    return decorate


def count_requests(function: _Function[_P, _T]) -> _Function[_P, _T]:
    """Decorate `FluxKontextClient._request`: count its requests by kind and outcome."""
    if not IS_ENABLED:
        return function

    @functools.wraps(function)
    async def counted(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        _self, _read, method, path = args[:4]
        kind = "submit" if method == "POST" else "poll" if "status" in str(path) else "balance"
        outcome = "Cancelled"
        try:
            result = await function(*args, **kwargs)
            outcome = "ok"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            _requests.add(1, {"kind": kind, "outcome": outcome})
        return result

    return counted


def measure_row(function: _Function[_P, _T]) -> _Function[_P, _T]:
    """Decorate the run of a row: trace each row, and count it by its state at the end."""
    if not IS_ENABLED:
        return function

    @trace("row")
    @functools.wraps(function)
    async def measured(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        done: Any = await function(*args, **kwargs)
        state = {"state": done.outcome.state}
        get_current_span().set_attributes(state)
        _rows.add(1, state)
        return done  # type: ignore[no-any-return]

    return measured


def count_stored_rows(rows: int) -> None:
    """Count rows that were stored before."""
    if IS_ENABLED and rows:
        _rows.add(rows, {"state": "stored"})


def measure_storing(function: _Function[_P, _T]) -> _Function[_P, _T]:
    """Decorate what waits for a row's task and stores its images: measure times and bytes."""
    if not IS_ENABLED:
        return function

    @functools.wraps(function)
    async def measured(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        row: Any = args[1]
        attributes = {"mode": row.request.mode}
        _outstanding.add(1, attributes)
        try:
            stored: Any = await function(*args, **kwargs)
        finally:
            _outstanding.add(-1, attributes)
        images, times = stored
        _bytes.add(sum(image.size for image in images), attributes)
        if times.generation_seconds is not None:
            _generation.record(times.generation_seconds, attributes)
        _waiting.record(times.waiting_seconds, attributes)
        return stored  # type: ignore[no-any-return]

    return measured
