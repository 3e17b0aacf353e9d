"""The command line takes nothing that could be misread."""

import pkgutil

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.cli.commands import create_parser

RUN = ["run", "manifest.csv", "out"]
COMMANDS = {
    name: command
    for action in create_parser()._actions
    for name, command in (action.choices or {}).items()
    if name != "limits"
}


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_repeated_columns_add_up():
    options = create_parser().parse_args(
        [*RUN, "--columns", "image=photo", "--columns", "prompt=text"]
    )
    assert options.columns == {"image": "photo", "prompt": "text"}


@pytest.mark.parametrize(
    "columns",
    [["image=a", "image=b"], ["image=a,image=b"], ["id=x,image=a", "prompt=p,image=b"]],
)
def test_two_names_for_one_column_are_refused(columns, capsys):
    options = [word for text in columns for word in ("--columns", text)]
    assert "image" in refusal([*RUN, *options], capsys)


@pytest.mark.parametrize(
    "abbreviation",
    [["--column", "image=a"], ["--budg", "1"], ["--resubmit"], ["--skip"], ["--promp", "x"]],
)
def test_abbreviated_options_are_refused(abbreviation, capsys):
    assert "unrecognized arguments" in refusal([*RUN, *abbreviation], capsys)


@pytest.mark.parametrize(
    "repeated",
    [
        ["--budget", "1", "--budget", "100"],
        ["--prompt", "a", "--prompt", "b"],
        ["--names", "{id}", "--names", "{id}"],
    ],
)
def test_repeated_options_are_refused(repeated, capsys):
    assert "given more than once" in refusal([*RUN, *repeated], capsys)


def test_styles_may_be_repeated():
    options = create_parser().parse_args([*RUN, "--style", "oil", "--style", "noir"])
    assert options.styles == ["oil", "noir"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "manifest.csv", ""],
        ["run", "", "out"],
        [*RUN, "--prompt", ""],
        [*RUN, "--style", " "],
        ["collect", ""],
        ["status", ""],
        ["retry-failed", ""],
        ["resolve", "out", "", "--rejected"],
    ],
)
def test_empty_values_are_refused(arguments, capsys):
    """They are mostly unset variables of the shell, and "" would mean the current folder."""
    assert "the value is empty" in refusal(arguments, capsys)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_handler(name):
    handler = COMMANDS[name].get_default("handler")
    assert callable(pkgutil.resolve_name(f"prefect_flux_kontext.cli.{handler}"))
