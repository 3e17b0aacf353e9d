"""Sets of the sandbox's faults, by whether they stop a batch or leave a row unknown."""

from prefect_flux_kontext.sandbox.faults.handlers import FAULTS

# No client can detect that the service names another task than the one it has accepted.
_UNDETECTABLE = {"submit:wrong-task-id"}

STOPPING = ("submit:unauthorized", "submit:no-balance", "status:unauthorized")
"""Faults that stop a batch."""

_REFUSED = {
    "submit:limited",
    "submit:limited-silently",
    "submit:limited-oddly",
    "submit:limited-in-200",
    "submit:too-many-tasks",
    "submit:too-many-tasks-in-200",
    "submit:refused",
    "submit:refused-content",
    "submit:slow",
    *STOPPING,
}

ALL = [
    f"{kind}:{name}"
    for kind, faults in FAULTS.items()
    if kind != "callback"  # these batches have no receiver
    for name in faults
    if f"{kind}:{name}" not in _UNDETECTABLE
]

UNKNOWN_OUTCOME = [fault for fault in ALL if fault.startswith("submit:") and fault not in _REFUSED]
"""Faults that leave the row unknown."""

NOT_ACCEPTED = {"submit:unavailable", "submit:unavailable-in-200", "submit:reset"}
"""Faults that leave the row unknown although the sandbox has not accepted it."""


def plan_each_fault_once(*kinds):
    """Plan every fault of the kinds once, a few requests apart, and stopping ones last."""
    planned = []
    for kind in kinds:
        names = [fault for fault in ALL if fault.startswith(f"{kind}:")]
        names.sort(key=lambda fault: fault in STOPPING)
        planned += [f"{fault}@{3 * number}" for number, fault in enumerate(names, start=1)]
    return planned


def plan_fault_shares(faults, share):
    """Plan each fault with a share of requests; rate limits, which slow a batch down, get less."""
    return [f"{fault}={share / 10 if 'limited' in fault else share:g}" for fault in faults]
