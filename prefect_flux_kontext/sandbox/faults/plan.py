"""A plan of faults: which, how often and from when to when. It follows from nothing but itself."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from prefect_flux_kontext.sandbox.faults.registry import FAULTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SPELLING = re.compile(
    r"(?P<kind>[a-z]+):(?P<name>[a-z0-9-]+)"
    r"(=(?P<share>[0-9]*\.?[0-9]+))?"
    r"(@(?P<first>[0-9]+)(?P<open>-(?P<last>[0-9]+)?)?)?"
)


class BadPlanError(ValueError):
    """A plan of faults that cannot be used; the message names what is wrong, a line each."""


@dataclass(frozen=True)
class PlannedFault:
    """One fault: `submit:lost-reply=0.02@100-200`.

    Attributes:
        kind: What it befalls.
        name: Its name among the faults of the kind.
        share: Of so many it befalls, 0 to 1.
        first: The number, from 1, of the first that it may befall.
        last: The number of the last, or None for no end.
    """

    kind: str
    name: str
    share: float = 1.0
    first: int = 1
    last: int | None = None

    def __str__(self) -> str:
        share = f"={self.share:g}" if self.share < 1 else ""
        if self.last is None:
            numbers = f"@{self.first}-" if self.first > 1 else ""
        else:
            numbers = f"@{self.first}" + (f"-{self.last}" if self.last > self.first else "")
        return f"{self.kind}:{self.name}{share}{numbers}"

    def at(self, number: int) -> bool:
        """Whether it may befall the n-th of its kind."""
        return self.first <= number and (self.last is None or number <= self.last)


def read_fault(text: Any) -> PlannedFault:
    """The fault that is spelled `KIND:FAULT`, then `=SHARE` and `@FIRST-LAST` where wanted.

    Raises:
        BadPlanError: It is spelled otherwise, or there is no such fault.
    """
    if isinstance(text, PlannedFault):
        return text
    spelled = _SPELLING.fullmatch(str(text))
    if spelled is None:
        raise BadPlanError(
            f"{str(text)[:80]!r} is not spelled KIND:FAULT=SHARE@FIRST-LAST, "
            "such as submit:lost-reply=0.02 or status:limited@100-200"
        )
    kind, name = spelled["kind"], spelled["name"]
    if kind not in FAULTS:
        raise BadPlanError(f"{text!r}: there is no kind {kind!r} but {', '.join(FAULTS)}")
    if name not in FAULTS[kind]:
        raise BadPlanError(f"{text!r}: nothing called {name!r} befalls a {kind}")
    share = float(spelled["share"] or 1)
    if share > 1:
        raise BadPlanError(f"{text!r}: a share is at most 1")
    first = int(spelled["first"] or 1)
    one = spelled["first"] is not None and spelled["open"] is None
    last = first if one else int(spelled["last"]) if spelled["last"] else None
    return PlannedFault(kind, name, share, first, last)


FaultSpec = Annotated[PlannedFault, BeforeValidator(read_fault), PlainSerializer(str)]


class FaultPlan(BaseModel):
    """What goes wrong, and how badly.

    Attributes:
        faults: Looked at in their order; where shares add up, the first come first.
        seed: Decides, with kind and number, whom a share befalls.
        hang: Seconds for which a reply that hangs is not given.
        slow: Seconds over which a slow reply is spread.
        late: Seconds by which a late callback is late.
    """

    # Checked anew where it is a PlannedFault already, so any may be given.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    faults: tuple[FaultSpec, ...] = ()
    seed: int = 0
    hang: float = Field(60.0, ge=0)
    slow: float = Field(5.0, ge=0)
    late: float = Field(600.0, ge=0)

    def fault(self, kind: str, number: int) -> str | None:
        """What befalls the n-th of a kind, or None; always the same for the same plan."""
        if not self.faults:
            return None
        dice = random.Random(f"{self.seed}/{kind}/{number}").random()
        for planned in self.faults:
            if planned.kind == kind and planned.at(number):
                dice -= planned.share
                if dice < 0:
                    return planned.name
        return None


def read_plan(given: object) -> FaultPlan:
    """A plan from what JSON or YAML gives.

    Raises:
        BadPlanError: All that is wrong with it.
    """
    try:
        return FaultPlan.model_validate(given)
    except ValidationError as invalid:
        raise BadPlanError("\n".join(map(_told, invalid.errors(include_url=False)))) from None


def load_plan(file: Path | None, faults: Sequence[str], seed: int) -> FaultPlan:
    """A plan from a file, with further faults in front of its own.

    Args:
        file: JSON or YAML, as `FaultPlan` has it; None for none.
        faults: As they are spelled on the command line.
        seed: Of the plan, unless the file has one.

    Raises:
        BadPlanError: The file cannot be read, or is no plan.
    """
    import yaml  # noqa: PLC0415 - few plans are files

    given: Any = {}
    if file is not None:
        try:
            given = yaml.safe_load(file.read_bytes()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise BadPlanError(f"{file} cannot be read: {error}") from None
        if not isinstance(given, dict):
            raise BadPlanError(f"{file} must hold a mapping with `faults`")
        if not isinstance(given.get("faults", []), list):
            raise BadPlanError(f"{file}: `faults` must be a list")
    return read_plan({"seed": seed, **given, "faults": [*faults, *given.get("faults", [])]})


def _told(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
