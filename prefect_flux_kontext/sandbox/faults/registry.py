"""Every fault by the kind of what it befalls. Its docstring is what users read about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = {
    "submit": "a submit; what has been accepted is billed, whatever befalls the reply",
    "status": "a status request",
    "download": "a request for a result image",
    "task": "an accepted task, in the order of acceptance; it lasts as long as the task",
    "callback": "the callback of a task that has ended",
}

FAULTS: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in KINDS}
"""By kind and name, what plays the fault."""

_Play = TypeVar("_Play", bound="Callable[..., Any]")


def applies(*kinds: str) -> Callable[[_Play], _Play]:
    """Registers a fault under its function's name, with hyphens, for kinds of happenings."""

    def register(play: _Play) -> _Play:
        for kind in kinds:
            FAULTS[kind][play.__name__.replace("_", "-")] = play
        return play

    return register


def described() -> str:
    """All faults, a line each, for a person at a terminal."""
    widest = max(len(name) for faults in FAULTS.values() for name in faults)
    lines = []
    for kind, faults in FAULTS.items():
        lines += ["", f"{kind}: {KINDS[kind]}"]
        lines += [f"  {name:<{widest}}  {_first_line(play)}" for name, play in faults.items()]
    return "\n".join(lines[1:])


def _first_line(play: Callable[..., Any]) -> str:
    return (play.__doc__ or "").partition("\n")[0].rstrip(".")
