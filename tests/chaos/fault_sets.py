"""The sandbox's faults as batches are put through them, and what each may cost."""

from prefect_flux_kontext.sandbox.faults.registry import FAULTS

# Nobody can tell that the service named another task than the one it has accepted.
_UNTOLD = {"submit:wrong-task-id"}

STOPPING = ("submit:unauthorized", "submit:no-balance", "status:unauthorized")
"""After these a batch stops by itself."""

_REFUSED = {
    "submit:limited",
    "submit:limited-silently",
    "submit:limited-oddly",
    "submit:limited-in-200",
    "submit:too-many-tasks",
    "submit:too-many-tasks-in-200",
    "submit:refused",
    "submit:slow",
    *STOPPING,
}

ALL = [
    f"{kind}:{name}"
    for kind, faults in FAULTS.items()
    if kind != "callback"  # nobody listens in these batches
    for name in faults
    if f"{kind}:{name}" not in _UNTOLD
]

DOUBTFUL = [fault for fault in ALL if fault.startswith("submit:") and fault not in _REFUSED]
"""After these nobody knows whether the row is paid for."""

NOT_ACCEPTED = {"submit:unavailable", "submit:unavailable-in-200", "submit:reset"}
"""Of those in doubt, what the sandbox has not accepted."""


def plan_each_fault_once(*kinds):
    """Every fault of the kinds once, a few requests apart, those that stop a batch at the end."""
    planned = []
    for kind in kinds:
        names = [fault for fault in ALL if fault.startswith(f"{kind}:")]
        names.sort(key=lambda fault: fault in STOPPING)
        planned += [f"{fault}@{3 * number}" for number, fault in enumerate(names, start=1)]
    return planned


def plan_fault_shares(faults, share):
    """Faults with a share each; fewer of those that slow a batch down on purpose."""
    return [f"{fault}={share / 10 if 'limited' in fault else share:g}" for fault in faults]
