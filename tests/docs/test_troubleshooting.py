"""The messages of the troubleshooting page exist in the code."""

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
_PLACEHOLDER = re.compile(r"%(?:,?\d*\.?\d*)[sdrf]")


def _text_of(node):
    """Return the text of a string in the source, with `…` for each inserted value."""
    match node:
        case ast.Constant(value=str() as text):
            return _PLACEHOLDER.sub("…", text)
        case ast.JoinedStr():
            return "".join(_text_of(part) or "…" for part in node.values)
    return None


@pytest.fixture(scope="module")
def texts():
    """Return every text in the package."""
    package = Path(prefect_flux_kontext.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    return {text for tree in trees for node in ast.walk(tree) if (text := _text_of(node))}


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_in_the_code(message, texts):
    wanted = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert any(wanted.search(text) for text in texts)


def test_every_error_class_has_its_flags():
    answers = {
        name: tuple(
            "yes" if flag else "no" for flag in (kind.not_accepted, kind.retryable, kind.fatal)
        )
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.FluxKontextError)
    }
    assert {name: tuple(flags) for name, *flags in CLASSES} == answers
    assert len(MESSAGES) > 80
