"""The reference is built from the code: the API under its public names, and the command line."""

import runpy
import subprocess
import sys

import pytest

import prefect_flux_kontext
from prefect_flux_kontext.cli.commands import create_parser
from tests.docs.blocks import ROOT
from tests.docs.test_names import options_of

TASKS = [
    (
        "submit_generation(request, credentials=None, ledger=None, key=None, "
        "storage_options=None, defer=None, references=None)"
    ),
    "wait_for_generation(task, credentials=None, cadence=None, storage_options=None)",
    "persist_images(result, output, name=None, storage_options=None)",
]
"""The beginnings of the tasks' signatures."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as text, and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "text", "--quiet", "--fail-on-warning"]
    built = subprocess.run(
        [*command, "-d", folder / "doctrees", ROOT / "docs", folder / "text"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder / "text"


@pytest.fixture(scope="module")
def api(site):
    return (site / "api.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("signature", TASKS)
def test_task_has_a_readable_signature(signature, api):
    shown = " ".join(api.split()).replace("( ", "(").replace(", ) ->", ") ->")
    assert f"prefect_flux_kontext.{signature} -> " in shown


@pytest.mark.parametrize("noise", ["fn(", "WithJsonSchema", "FieldInfo", "<class", ".models."])
def test_api_shows_no_internals(noise, api):
    assert noise not in api


def test_api_has_every_public_name(api):
    missing = [
        name for name in prefect_flux_kontext.__all__ if f"prefect_flux_kontext.{name}" not in api
    ]
    assert missing == []


def test_api_has_every_advanced_option(api):
    names = prefect_flux_kontext.AdvancedOptions.__annotations__
    assert [name for name in names if f'"{name}"' not in api] == []


def test_command_line_page_has_every_option(site):
    page = (site / "cli.txt").read_text(encoding="utf-8")
    assert [
        option
        for option in sorted(options_of(create_parser()) - {"--help", "--version"})
        if option not in page
    ] == []


def test_settings_page_is_up_to_date():
    """`python docs/generated.py` writes it."""
    pages = runpy.run_path(str(ROOT / "docs" / "generated.py"))
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == pages["settings_page"]()
