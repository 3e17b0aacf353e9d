"""The pictures of docs/architecture.md, held against the code."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from prefect_flux_kontext.ledger.records import MOVES, State

ROOT = Path(__file__).parents[1]
PACKAGE = "prefect_flux_kontext"
TEXT = (ROOT / "docs" / "architecture.md").read_text()
NAMES_END = 26
"""The column of the picture at which names end and what they are for begins."""


class Room(NamedTuple):
    """A place in the picture.

    Attributes:
        floor: Its line, counted from the top.
        place: Its place on the line, counted from the left.
        core: Whether it is below the line.
    """

    floor: int
    place: int
    core: bool


def picture(heading):
    """The lines of the drawing below a heading."""
    return TEXT.partition(f"## {heading}\n")[2].split("```\n")[1].splitlines()


def drawn():
    """Each room of the picture by name, and the folders drawn inside rooms."""
    rooms, inside, core, around = {}, [], False, None
    for floor, line in enumerate(picture("Rooms")):
        if line.startswith("──"):
            core = True
            continue
        names = line[:NAMES_END].split()
        if line.startswith("  ") and names:
            inside += [f"{around}{name}" for name in names]
            continue
        for place, name in enumerate(names):
            rooms[name.rstrip("/")] = Room(floor, place, core)
            around = name
    return rooms, inside


ROOMS, INSIDE = drawn()
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
FACES = {f"{PACKAGE}.__init__", f"{PACKAGE}.__main__"}
"""They hand on names, and start the command line."""


def room_of(module):
    return module.split(".")[1]


@cache
def imports(module):
    """What a module imports wherever in it, also for its types alone: that is to know it too."""
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by dots"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports(module):
    """What of ours a module imports."""
    return [name for name in imports(module) if name.startswith(f"{PACKAGE}.")]


def may_know(importer, imported):
    """Whether the picture lets one room import another."""
    a, b = ROOMS[importer], ROOMS[imported]
    return importer == imported or (a.floor, a.place) < (b.floor, b.place)


def test_each_module_has_its_place_in_the_picture_and_each_place_its_module():
    assert {room_of(module) for module in MODULES.keys() - FACES} == ROOMS.keys()
    folders = {
        f"{path.relative_to(ROOT / PACKAGE).as_posix()}/"
        for path in (ROOT / PACKAGE).glob("*/*")
        if path.is_dir() and (path / "__init__.py").exists()
    }
    assert folders == set(INSIDE)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_what_is_drawn_below_it(name):
    upwards = [
        f"{module} imports {imported}"
        for module in MODULES.keys() - FACES
        if room_of(module) == name
        for imported in own_imports(module)
        if room_of(imported) in ROOMS and not may_know(name, room_of(imported))
    ]
    assert upwards == []


def test_the_sandbox_shares_no_code_with_the_rest():
    for module in MODULES.keys() - FACES:
        rooms = {room_of(imported) for imported in own_imports(module)} & ROOMS.keys()
        if room_of(module) == "sandbox":
            assert rooms <= {"sandbox"}, module
        elif room_of(module) != "cli":
            assert "sandbox" not in rooms, module


def test_below_the_line_nothing_names_prefect():
    core = [module for module in MODULES.keys() - FACES if ROOMS[room_of(module)].core]
    assert len(core) > 80
    for module in core:
        assert not [name for name in imports(module) if name.split(".")[0] == "prefect"], module
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(core)!r}:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "    if 'prefect' in sys.modules:\n"
        "        sys.exit(f'{name} imports prefect')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_way_of_a_row_names_the_states_that_there_are():
    lines = picture("The way of one row")
    asked = [line.split("─►")[0].split() for line in lines if re.match(r"   \w", line)]
    assert sorted(state for (state,) in asked) == sorted(set(State) - {State.SUCCEEDED})
    named = set(re.findall(r"\w+", "\n".join(lines)))
    assert set(State) <= named


def test_the_moves_of_a_row_are_those_of_the_ledger():
    told = TEXT.partition("| from | to |\n|---|---|\n")[2].partition("\n\n")[0]
    moves = {}
    for line in told.splitlines():
        state, to = (cell.strip() for cell in line.strip("|").split("|"))
        moves[State(state)] = {State(name) for name in to.split(", ") if name}
    assert moves == MOVES
