"""The registry of faults by kind. `--fault help` shows their descriptions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.faults.exchange import Exchange

Handler = Callable[["Exchange"], Awaitable[None]]

KINDS = {
    "submit": "a submit; an accepted task is billed even when its reply is lost",
    "status": "a status request",
    "download": "a request for a result image",
    "task": "an accepted task, in the order of acceptance; it lasts as long as the task",
    "callback": "the callback of a task that has ended",
}

FAULTS: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
"""By kind and name, the description of the fault."""

# The sandbox's `lifecycle` applies these.
FAULTS["callback"] = {
    "lost": "It is never delivered",
    "doubled": "It is delivered twice",
    "late": "It is delivered `late` seconds late",
    "overtaken": "It is delivered up to `late` seconds late, so others arrive first",
    "forged": "A forged callback with another task and result arrives first, at the right URL",
    "misdirected": "A forged callback arrives first, at a URL whose token is wrong",
}

HANDLERS: dict[tuple[str, str], Handler] = {}
"""By kind and name, what answers a request to which the fault applies."""


def register(kinds: tuple[str, ...], name: str, description: str, handler: Handler) -> None:
    """Add a fault of requests."""
    for kind in kinds:
        FAULTS[kind][name] = description
        HANDLERS[kind, name] = handler


def applies(*kinds: str) -> Callable[[Handler], Handler]:
    """Register a handler under its function's name, described by its docstring."""

    def decorate(handler: Handler) -> Handler:
        name = handler.__name__.replace("_", "-")
        register(kinds, name, (handler.__doc__ or "").rstrip("."), handler)
        return handler

    return decorate


def describe_faults() -> str:
    """Return the help text on all faults, one line for each."""
    widest = max(len(name) for faults in FAULTS.values() for name in faults)
    lines = []
    for kind, faults in FAULTS.items():
        lines += ["", f"{kind}: {KINDS[kind]}"]
        lines += [f"  {name:<{widest}}  {text}" for name, text in faults.items()]
    return "\n".join(lines[1:])
