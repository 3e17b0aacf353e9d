"""`plan` and `run`: every invalid row is shown, and nothing is paid while there is one."""

import json

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.cli.commands import create_parser
from prefect_flux_kontext.cli.options import manifest_from_options
from prefect_flux_kontext.manifest.reader import Manifest

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
    assert "line 4, 'c'" not in out, "shows the same twice"
    assert "line 4, 'c'" in error
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


@pytest.mark.parametrize("option", [["--json"], ["-q"]])
def test_equal_problems_are_one_line(option, command):
    """What is quoted may differ; the lines are named."""
    content = "prompt,mode\n" + "x,turbo\ny,fast\n" + "z,max\n" + "x,slow\n,max\n"
    status, out, _ = command("plan", content, *option)
    assert status == 1
    if option == ["--json"]:
        assert [problem["line"] for problem in json.loads(out)["problems"]] == [2, 3, 5, 6]
    else:
        assert out.splitlines()[0].startswith("  3 rows (lines 2-3, 5), such as: mode 'turbo': ")
        assert len(out.splitlines()) == 2


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--mode", "max", "mode"),
        ("--aspect-ratio", "1:1", "aspect_ratio"),
        ("--output-format", "png", "output_format"),
        ("--provider", "value", "provider"),
    ],
)
def test_parameters_are_for_rows_that_name_none(option, value, field, tmp_path, capsys):
    """An option overrides the style, and a row's own cell overrides the option."""
    styles = tmp_path / "styles.yaml"
    styles.write_text("wide: {prompt: x, mode: pro, aspect_ratio: '21:9', output_format: jpeg}")
    own = {"mode": "pro", "aspect_ratio": "9:16", "output_format": "jpeg", "provider": "auto"}
    path = tmp_path / "m.csv"
    path.write_text(f"id,prompt,{field}\na,oil,\nb,oil,{own[field]}\n")
    options = create_parser().parse_args(
        ["run", str(path), "out", "--style", str(styles), option, value]
    )
    rows = list(manifest_from_options(options).rows())
    assert [getattr(row.request, field) for row in rows] == [value, own[field]]
    (again, _) = Manifest([dict(row.cells) for row in rows], styles=str(styles)).rows()
    assert again.key == rows[0].key, "the retry of a failed row would be another row"


def test_invalid_parameter_is_refused_once(command):
    status, out, error = command("plan", "prompt\nx\ny\n", "--mode", "turbo")
    assert (status, out) == (2, "")
    assert error.startswith("flux-kontext: For all rows: mode 'turbo': Input should be")


def test_limit_pays_for_the_first_new_rows(command, sandbox):
    """Rows after them are checked and counted; the next run with a limit goes on."""
    content = "id,prompt\n" + "".join(f"r{n},oil {n}\n" for n in range(6))
    status, out, _ = command("run", content, "--limit", "2", "--budget", "1")
    assert status == 0
    assert "4  after the last row within the limit, not run" in out
    assert "2 of 2 rows stored" in out
    status, out, _ = command("run", content, "-l", "3", "--json")
    assert status == 0
    assert json.loads(out)["stored"] == 5
    assert sandbox.service.bill()["accepted"] == 5
    assert command("run", content.replace("oil 5", ""), "--limit", "1")[0] == 2


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_limit_is_a_number_of_1_or_more(value, command):
    with pytest.raises(SystemExit) as caught:
        command("plan", "prompt\nx\n", "--limit", value)
    assert caught.value.code == 2
