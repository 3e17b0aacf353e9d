"""What docs/architecture.md says, held against the code.

The layers themselves are contracts in pyproject.toml, which `lint-imports` checks.
"""

import re
import tomllib
from pathlib import Path

from prefect_flux_kontext.ledger.records import MOVES, State

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prefect_flux_kontext"
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def drawing(heading):
    """The lines of the first drawing below a heading."""
    return TEXT.partition(f"## {heading}\n")[2].split("```\n")[1].splitlines()


def top_level_names():
    """Packages and modules directly in the package, without `__init__` and `__main__`."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    return packages | {name for name in modules if not name.startswith("__")}


def contracts():
    """The import contracts by name."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return {contract["name"]: contract for contract in tool["importlinter"]["contracts"]}


def test_layers_contract_names_every_package():
    layers = contracts()["Lower layers never import higher ones"]["layers"]
    assert {*layers, "sandbox"} == top_level_names()


def test_core_contract_names_every_layer_below_credentials():
    layers = contracts()["Lower layers never import higher ones"]["layers"]
    below = layers[layers.index("credentials") + 1 :]
    core = contracts()["The core does not import Prefect"]["source_modules"]
    assert core == sorted(f"prefect_flux_kontext.{name}" for name in [*below, "sandbox"])


def test_sandbox_contracts_name_every_other_package():
    others = {f"prefect_flux_kontext.{name}" for name in top_level_names() - {"sandbox"}}
    shares = contracts()["The sandbox shares no code with the rest"]["forbidden_modules"]
    starts = contracts()["Only the command line starts the sandbox"]["source_modules"]
    assert set(shares) == others
    assert set(starts) == others - {"prefect_flux_kontext.cli"}


def test_drawing_of_layers_names_every_package():
    drawn = {word.rstrip("/") for line in drawing("Layers") for word in line[:26].split()}
    assert top_level_names() <= drawn


def test_at_most_twelve_modules_are_loose():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_way_of_a_row_names_every_state():
    words = set(re.findall(r"\w+", "\n".join(drawing("The way of one row"))))
    assert set(State) <= words


def test_table_of_moves_is_the_ledgers():
    table = TEXT.partition("| from | to |\n|---|---|\n")[2].partition("\n\n")[0]
    moves = {}
    for line in table.splitlines():
        state, to = (cell.strip() for cell in line.strip("|").split("|"))
        moves[State(state)] = {State(name) for name in to.split(", ") if name}
    assert moves == MOVES
