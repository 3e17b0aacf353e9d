"""Options, variables and links that pages name between their blocks are there."""

import argparse
import re

import pytest

from prefect_flux_kontext.cli import _parser
from prefect_flux_kontext.settings import FluxKontextSettings
from tests.docs.blocks import PAGES


def options_of(parser):
    """The long options of a parser and of its commands."""
    found = set()
    for action in parser._actions:
        found |= {option for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= options_of(command)
    return found


@pytest.fixture(scope="module")
def options():
    return options_of(_parser())


@pytest.mark.parametrize("page", PAGES)
def test_each_option_that_a_page_names_is_one_of_the_command_line(page, options):
    text = PAGES[page].read_text(encoding="utf-8")
    code = re.findall(r"`((?:--|flux-kontext )[^`\n]+)`", text)
    named = {option for text in code for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    assert named <= options


@pytest.mark.parametrize("page", PAGES)
def test_each_variable_that_a_page_names_is_a_setting(page):
    settings = {name.upper() for name in FluxKontextSettings.model_fields}
    text = PAGES[page].read_text(encoding="utf-8")
    assert set(re.findall(r"FLUX_KONTEXT_([A-Z_]*[A-Z])\b", text)) <= settings | {"CALLBACK"}


@pytest.mark.parametrize("page", PAGES)
def test_each_file_that_a_page_links_to_is_there(page):
    path = PAGES[page]
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
