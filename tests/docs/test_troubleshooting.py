"""The page of messages, held against the code that says them."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import prefect_flux_kontext
from prefect_flux_kontext import errors
from tests.docs.blocks import PAGES

PAGE = PAGES["docs/troubleshooting.md"].read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `(.+?)` \| [^|]+ \|$", PAGE, re.MULTILINE)
CLASSES = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| ", PAGE, re.MULTILINE)
_HOLE = re.compile(r"%(?:,?\d*\.?\d*)[sdrf]")


def _said(node):
    """The text of a string in the source, with `…` where something is put in."""
    match node:
        case ast.Constant(value=str() as text):
            return _HOLE.sub("…", text)
        case ast.JoinedStr():
            return "".join(_said(part) or "…" for part in node.values)
    return None


@pytest.fixture(scope="module")
def said():
    """Every text in the package."""
    package = Path(prefect_flux_kontext.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    return {text for tree in trees for node in ast.walk(tree) if (text := _said(node))}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_one_that_the_code_says(message, said):
    wanted = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert any(wanted.search(text) for text in said)


def test_each_class_of_errors_has_its_entry_with_what_it_means_for_the_money():
    answers = {
        name: tuple(
            "yes" if said else "no" for said in (kind.not_accepted, kind.retryable, kind.fatal)
        )
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.FluxKontextError)
    }
    assert {name: tuple(told) for name, *told in CLASSES} == answers
    assert len(MESSAGES) > 80
