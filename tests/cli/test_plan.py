"""`plan` and `run`: every invalid row is shown, and nothing is paid while there is one."""

import pytest

from prefect_flux_kontext.cli import main

MIXED = "name,text,mode\na,oil,\nb,,\nc,ink,turbo\nd,oil,\n"


@pytest.fixture
def command(tmp_path, capsys):
    """Run a command on a manifest with the given text; return its status and its output."""

    def run(name, content, *options):
        path = tmp_path / "m.csv"
        path.write_text(content)
        status = main([name, str(path), str(tmp_path / "out"), *options])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


NAMES = ("--columns", "id=name,prompt=text")


def test_plan_shows_invalid_rows_without_a_key(command):
    status, out, _ = command("plan", MIXED, *NAMES)
    assert status == 1
    assert "  line 3, 'b': prompt is missing" in out
    assert "  line 4, 'c': mode 'turbo'" in out
    assert "        1  equal to others, paid once" in out
    assert "    $0.03  price: 1 in pro at $0.03" in out
    assert command("plan", "prompt\noil\n")[0] == 0


def test_invalid_row_stops_run_before_paying(command, sandbox):
    """The message names --skip-invalid."""
    status, out, error = command("run", MIXED, *NAMES)
    assert status == 2
    assert "line 4, 'c'" in out
    assert "--skip-invalid" in error
    assert sandbox.service.bill()["accepted"] == 0


def test_skip_invalid_stores_the_other_rows(command, sandbox):
    status, out, _ = command("run", MIXED, *NAMES, "--skip-invalid")
    assert status == 1
    assert "2 of 4 rows stored" in out
    assert sandbox.service.bill()["accepted"] == 1


def test_dry_run_stops_after_the_plan(command, sandbox):
    status, out, _ = command("run", "prompt\noil\n", "--dry-run")
    assert status == 0
    assert "to be paid" in out
    assert command("run", "prompt\n\n \nx\n ,y\n", "--dry-run")[0] == 2
    assert sandbox.service.bill()["accepted"] == 0


def test_run_stops_at_its_budget(command, sandbox):
    content = "prompt\n" + "".join(f"oil {n}\n" for n in range(9))
    status, out, error = command("run", content, "--budget", "$0.10")
    assert status == 1
    assert "not enough for all rows" in out
    assert "The budget of $0.10 for this output is reached" in error
    assert sandbox.service.bill()["accepted"] == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [("--budget", "lots"), ("--budget", "-1"), ("--budget", "nan"), ("--columns", "image")],
)
def test_unreadable_option_is_refused(command, option, value):
    with pytest.raises(SystemExit) as caught:
        command("plan", "prompt\nx\n", option, value)
    assert caught.value.code == 2
