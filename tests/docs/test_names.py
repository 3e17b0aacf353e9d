"""Options, variables and links in the text of the pages exist."""

import argparse
import re

import pytest

from prefect_flux_kontext.cli.commands import create_parser
from prefect_flux_kontext.settings import FluxKontextSettings
from tests.docs.blocks import PAGES


def options_of(parser):
    """Return the long options of a parser and of its commands."""
    found = set()
    for action in parser._actions:
        found |= {option for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= options_of(command)
    return found


@pytest.fixture(scope="module")
def options():
    return options_of(create_parser())


@pytest.mark.parametrize("page", PAGES)
def test_options_on_a_page_exist(page, options):
    text = PAGES[page].read_text(encoding="utf-8")
    code = re.findall(r"`((?:--|flux-kontext )[^`\n]+)`", text)
    named = {option for text in code for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    assert named <= options


@pytest.mark.parametrize("page", PAGES)
def test_variables_on_a_page_are_settings(page):
    settings = {name.upper() for name in FluxKontextSettings.model_fields}
    text = PAGES[page].read_text(encoding="utf-8")
    assert set(re.findall(r"FLUX_KONTEXT_([A-Z_]*[A-Z])\b", text)) <= settings | {"CALLBACK"}


@pytest.mark.parametrize("page", PAGES)
def test_links_on_a_page_lead_to_files(page):
    path = PAGES[page]
    # GitHub has pages beside the files of a repository, such as those of its workflows.
    pattern = r"\]\((?!https?://|#|\.\./\.\./actions/)([^)#\s]+)"
    links = re.findall(pattern, path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
