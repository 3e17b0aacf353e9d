"""The registry of faults by kind. `--fault help` shows the first line of their docstrings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = {
    "submit": "a submit; an accepted task is billed even when its reply is lost",
    "status": "a status request",
    "download": "a request for a result image",
    "task": "an accepted task, in the order of acceptance; it lasts as long as the task",
    "callback": "the callback of a task that has ended",
}

FAULTS: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in KINDS}
"""By kind and name, the function that produces the fault."""

_Handler = TypeVar("_Handler", bound="Callable[..., Any]")


def applies(*kinds: str) -> Callable[[_Handler], _Handler]:
    """Register a fault for kinds under its function's name, with hyphens."""

    def register(handler: _Handler) -> _Handler:
        for kind in kinds:
            FAULTS[kind][handler.__name__.replace("_", "-")] = handler
        return handler

    return register


def describe_faults() -> str:
    """Return the help text on all faults, one line for each."""
    widest = max(len(name) for faults in FAULTS.values() for name in faults)
    lines = []
    for kind, faults in FAULTS.items():
        lines += ["", f"{kind}: {KINDS[kind]}"]
        lines += [
            f"  {name:<{widest}}  {_first_line(handler)}" for name, handler in faults.items()
        ]
    return "\n".join(lines[1:])


def _first_line(handler: Callable[..., Any]) -> str:
    return (handler.__doc__ or "").partition("\n")[0].rstrip(".")
