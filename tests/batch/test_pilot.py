"""The pilot of a batch: which rows it has, and what runs after it."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from prefect_flux_kontext.batch.pilot import PilotSample
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.manifest.reader import Manifest
from tests.cli.conftest import sandbox  # noqa: F401


def rows_of(number, *styles):
    lines = [{"id": n, "prompt": f"p{n}"} for n in range(number)]
    return list(Manifest(lines, styles=list(styles)).rows())


def draw(rows, size):
    sample = PilotSample(size)
    for row in rows:
        sample.add(row)
    return sample.names()


@pytest.mark.parametrize(
    ("size", "shares"), [(9, [3, 3, 3]), (10, [3, 3, 4]), (2, [1, 1]), (600, [200, 200, 200])]
)
def test_sample_has_equal_shares_of_all_styles(size, shares):
    names = draw(rows_of(200, "oil", "noir", "pencil"), size)
    assert sorted(Counter(name.partition("/")[2] for name in names).values()) == shares


def test_small_style_leaves_its_share_to_the_others():
    rows = [*rows_of(50, "oil"), *rows_of(1, "noir")]
    shares = Counter(name.partition("/")[2] for name in draw(rows, 10))
    assert shares == {"oil": 9, "noir": 1}


def test_sample_depends_on_the_rows_and_not_on_their_order():
    rows = rows_of(200, "oil", "noir")
    shuffled = random.Random(1).sample(rows, len(rows))
    assert draw(rows, 20) == draw(shuffled, 20)
    ids = sorted(int(name.partition("/")[0]) for name in draw(rows, 20))
    assert max(ids) > 100  # not the first ones


def run(tmp_path, *options):
    lines = "".join(f"{n},A lighthouse {n}\n" for n in range(12))
    (tmp_path / "m.csv").write_text(f"id,prompt\n{lines}")
    return main(["run", str(tmp_path / "m.csv"), str(tmp_path / "out"), *options])


def test_pilot_without_a_terminal_stops_after_the_sample(sandbox, tmp_path, capsys):  # noqa: F811
    assert run(tmp_path, "--pilot", "4") == 1
    out = capsys.readouterr().out
    assert "4  in the pilot, which runs first" in out
    assert "4 of 12 rows stored; 8 not submitted" in out
    assert sandbox.service.bill()["accepted"] == 4
    assert run(tmp_path) == 0
    assert sandbox.service.bill()["accepted"] == 12


def test_pilot_with_yes_runs_the_rest(sandbox, tmp_path, capsys):  # noqa: F811
    assert run(tmp_path, "--pilot", "4", "--yes", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["stored"], summary["already_stored"]) == (12, 4)
    assert sandbox.service.bill()["accepted"] == 12


def test_pilot_that_would_have_all_rows_is_none(sandbox, tmp_path, capsys):  # noqa: F811
    assert run(tmp_path, "--pilot", "12") == 0
    assert "in the pilot" not in capsys.readouterr().out


def test_pilot_and_limit_are_refused_together(sandbox, tmp_path, capsys):  # noqa: F811
    assert run(tmp_path, "--pilot", "4", "--limit", "5") == 2
    assert "not both" in capsys.readouterr().err
    assert sandbox.service.bill()["accepted"] == 0


_AT_TERMINAL = """
import os, pty, sys
shown, asked = b"", False
process, terminal = pty.fork()
if not process:
    os.execv(sys.executable, [sys.executable, "-m", "prefect_flux_kontext", *sys.argv[2:]])
while True:
    try:
        part = os.read(terminal, 1024)
    except OSError:
        break
    shown += part
    if b"[y/N]" in shown and not asked:
        asked = True
        os.write(terminal, sys.argv[1].encode() + b"\\n")
print(shown.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


@pytest.mark.parametrize(("answer", "status", "paid"), [("y", 0, 12), ("n", 1, 4), ("", 1, 4)])
def test_pilot_at_a_terminal_asks(sandbox, tmp_path, answer, status, paid):  # noqa: F811
    lines = "".join(f"{n},A lighthouse {n}\n" for n in range(12))
    (tmp_path / "m.csv").write_text(f"id,prompt\n{lines}")
    command = ["run", str(tmp_path / "m.csv"), str(tmp_path / "out"), "--pilot", "4"]
    done = subprocess.run(
        [sys.executable, "-c", _AT_TERMINAL, answer, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Run the other 8 images for $0.24? [y/N]" in done.stdout
    assert done.returncode == status
    assert sandbox.service.bill()["accepted"] == paid
