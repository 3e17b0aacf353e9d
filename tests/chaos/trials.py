"""Batches of a scenario: how they are made, finished and counted."""

import sys
from dataclasses import asdict, dataclass, fields
from decimal import Decimal

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from tests.chaos.processes import Batch
from tests.chaos.report_checks import check_status, check_summary, check_summary_under_faults


def print_now(text):
    """Print the text and flush."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass
class Totals:
    """The totals of a scenario, a line of the table."""

    runs: int = 0
    rows: int = 0
    kills: int = 0
    billed: Decimal = Decimal(0)
    paid_twice: int = 0
    lost: int = 0
    missing: int = 0
    unknown_held: int = 0
    problems: int = 0

    def add(self, found, kills=0, runs=0):
        self.rows += found.rows
        self.runs += runs
        self.kills += kills
        self.billed += found.paid
        self.paid_twice += found.paid_twice
        self.lost += found.lost
        self.missing += found.missing
        self.unknown_held += found.unknown
        self.problems += len(found.problems)
        for problem in found.problems[:5]:
            print_now(f"     {problem}")

    def __add__(self, other):
        return Totals(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    def to_json(self):
        return asdict(self) | {"billed": str(self.billed)}

    @classmethod
    def from_json(cls, totals):
        return cls(**totals | {"billed": Decimal(totals["billed"])})

    def forbid_unknown(self, found):
        """Count unknown rows of a batch that was never killed as a problem."""
        if found.unknown:
            self.problems += 1
            print_now(f"     {found.unknown} rows are unknown though each reply was awaited")

    def broken(self):
        return self.paid_twice or self.lost or self.missing or self.problems

    def __str__(self):
        return (
            f"{self.runs} runs, {self.rows} rows, {self.kills} kills, ${self.billed}, "
            f"{self.paid_twice} paid twice, {self.lost} lost, {self.missing} missing, "
            f"{self.problems} other findings, {self.unknown_held} unknown"
        )


class BatchFactory:
    """Creates the batches of a scenario, with their folders and service.

    Args:
        folder: For manifests, logs and local outputs.
        service: The sandbox.
        stack: Closed at the end of the scenario.
        bucket: Where outputs go instead.
        access: Environment variables for access to the bucket.

    Attributes:
        flow_runs: The scenario's Prefect, once a case has started it.
    """

    def __init__(self, folder, service, stack, bucket=None, access=None):
        self.folder = folder
        self.service = service
        self.stack = stack
        self.flow_runs = None
        self.bucket = bucket
        # Fewer polls than in the small tests, because two cores serve all of it.
        self.environment = {
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0.6",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
            "FLUX_KONTEXT_POLL_TIMEOUT": "15",
            "FLUX_KONTEXT_GALLERY_IMAGES": "60",
        } | (access or {})
        self.number = 0

    def inject_faults(self, rng, faults, **how):
        """Activate faults of the service."""
        plan = FaultPlan(faults=faults, seed=rng.getrandbits(32), hang=0.5, slow=0.5, **how)
        self.service.active_faults.change(plan)

    def create_batch(self, rows, **environment):
        """Create a batch in which one of fifty rows equals another."""
        self.number += 1
        folder = self.folder / f"{self.number}"
        folder.mkdir(parents=True)
        output = f"{self.bucket}/{self.folder.name}/{self.number}" if self.bucket else None
        batch = Batch(self.service, folder, output, **self.environment | environment)
        name = f"{self.folder.name} {self.number}"
        batch.write([(f"row-{n}", f"{name} lighthouse {n - n % 50 // 49}") for n in range(rows)])
        return batch


def finish(line, batch, runs, **how):
    """Finish a batch, check it, and check that a further run pays for nothing.

    The first run is under the active faults, the others are not.

    Args:
        line: The totals to add the findings to.
        batch: The batch to finish.
        runs: How many runs there were before.
        how: Options of the first run.

    Returns:
        What the check found.
    """
    first, billed = _billed(batch, **how)
    batch.service.active_faults.change(FaultPlan())
    for _ in range(5):
        ended, billed_then = _billed(batch)
        runs += 1
        if ended.status in (0, 1):
            break
    found = batch.check()
    check_summary_under_faults(found, first, billed, len(batch.lines))
    check_summary(found, ended, billed_then)
    check_status(found, batch.command("status").said)
    _, more = _billed(batch)
    if more:
        found.problems.append(f"a finished batch paid ${more} more")
    if found.stored + found.failed + found.unknown != found.rows:
        found.problems.append(f"rows do not add up: {found}")
    line.add(found, batch.kills, runs + 2)
    return found


def _billed(batch, **how):
    before = batch.billed
    ended = batch.run(**how)
    return ended, batch.billed - before
