"""`plan` and `run`: every invalid row is told, and nothing is paid while there is one."""

import pytest

from prefect_flux_kontext.cli import main

MIXED = "name,text,mode\na,oil,\nb,,\nc,ink,turbo\nd,oil,\n"


@pytest.fixture
def command(tmp_path, capsys):
    """Run a command on a manifest of that text and tell its status and what it has printed."""

    def run(name, content, *options):
        path = tmp_path / "m.csv"
        path.write_text(content)
        status = main([name, str(path), str(tmp_path / "out"), *options])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


NAMES = ("--columns", "id=name,prompt=text")


def test_a_plan_needs_no_key_and_tells_every_invalid_row_with_its_line(command):
    status, told, _ = command("plan", MIXED, *NAMES)
    assert status == 1
    assert "  line 3, 'b': prompt is missing" in told
    assert "  line 4, 'c': mode 'turbo'" in told
    assert "        1  equal to others, paid once" in told
    assert "    $0.03  price: 1 in pro at $0.03" in told
    assert command("plan", "prompt\noil\n")[0] == 0


def test_a_run_with_an_invalid_row_pays_nothing_and_says_how_to_go_on(command, sandbox):
    status, told, error = command("run", MIXED, *NAMES)
    assert status == 2
    assert "line 4, 'c'" in told
    assert "--skip-invalid" in error
    assert sandbox.service.bill()["accepted"] == 0


def test_with_skip_invalid_the_other_rows_are_stored(command, sandbox):
    status, told, _ = command("run", MIXED, *NAMES, "--skip-invalid")
    assert status == 1
    assert "2 of 4 rows stored" in told
    assert sandbox.service.bill()["accepted"] == 1


def test_a_dry_run_stops_after_the_plan(command, sandbox):
    status, told, _ = command("run", "prompt\noil\n", "--dry-run")
    assert status == 0
    assert "to be paid" in told
    assert command("run", "prompt\n\n \nx\n ,y\n", "--dry-run")[0] == 2
    assert sandbox.service.bill()["accepted"] == 0


def test_a_run_ends_at_its_budget(command, sandbox):
    content = "prompt\n" + "".join(f"oil {n}\n" for n in range(9))
    status, told, error = command("run", content, "--budget", "$0.10")
    assert status == 1
    assert "not enough for all rows" in told
    assert "The budget of $0.10 for this output is reached" in error
    assert sandbox.service.bill()["accepted"] == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [("--budget", "lots"), ("--budget", "-1"), ("--budget", "nan"), ("--columns", "image")],
)
def test_an_option_that_cannot_be_meant_is_refused(command, option, value):
    with pytest.raises(SystemExit) as caught:
        command("plan", "prompt\nx\n", option, value)
    assert caught.value.code == 2
