"""The code that runs the documentation's blocks detects what is wrong with them."""

import pytest

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.sandbox.faults.plan import BadPlanError
from tests.docs.blocks import Block, blocks_in
from tests.docs.reader import Reader
from tests.docs.terminal import Terminal, commands_of, matches

PAGE = """
<!-- file: m.csv -->
```csv
id,prompt
```

1. In a list:

   <!-- not run: it needs a bucket
   of yours -->
   ```console
   $ ls
   ```

<!-- another comment -->
```
a picture
```
"""


def test_blocks_have_lines_and_comments():
    saved, unrun, picture = blocks_in(PAGE, "p.md")
    assert saved == Block("p.md", 3, "csv", "id,prompt\n", file="m.csv")
    assert (unrun.line, unrun.text) == (11, "$ ls\n")
    assert unrun.not_run.split() == ["it", "needs", "a", "bucket", "of", "yours"]
    assert picture == Block("p.md", 16, "", "a picture\n")


def test_commands_have_their_output():
    text = "$ one \\\n    --two\n$ three   # why\nout\n\nput\n"
    assert list(commands_of(text)) == [("one --two", ""), ("three   # why", "out\n\nput")]


def test_output_without_a_command_raises():
    with pytest.raises(AssertionError, match="below no command"):
        list(commands_of("out\n$ one"))


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1", "a 1\n", True),
        ("a 1", "a 2\n", False),
        ("a … z", "a b c z", True),
        ("a …", "a b\nc", False),
        ("…\nz", "a\nb\nz", True),
        ("…\nz", "a\nz\nb", False),
        ("a\n…", "a", True),
        ("a.c", "abc", False),
    ],
)
def test_matches_shown_with_printed(shown, printed, same):
    assert matches(shown, printed) is same


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Yield a reader without any server."""
    monkeypatch.chdir(tmp_path)
    with Terminal(tmp_path, {"there": "here"}) as terminal:
        yield Reader(tmp_path, terminal)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("console", "$ false\n"),
        ("console", "$ echo there\nthere and more\n"),
        ("console", "$ false\n$ echo $?\n0\n"),
        ("python", "raise AssertionError\n"),
        ("python", "import asyncio\nawait asyncio.sleep(0)\nassert False\n"),
        ("csv", "id,file\na,b\n"),
        ("jsonl", '{"image": "ftp://example.com/x.jpg"}\n'),
        ("yaml", "faults: [submit:nonsense]\n"),
        ("bash", "ls\n"),
        ("", "$ ls\n"),
    ],
)
def test_block_that_fails_raises(language, text, alone):
    with pytest.raises((AssertionError, ManifestError, BadPlanError)):
        alone.follow(Block("p.md", 1, language, text))


def test_exported_variable_reaches_later_commands(alone, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_ACCOUNT", "before")
    text = "$ export FLUX_KONTEXT_ACCOUNT=there\n$ echo $FLUX_KONTEXT_ACCOUNT\nthere\n"
    alone.follow(Block("p.md", 1, "console", text))
    alone.follow(Block("p.md", 1, "console", "$ flux-kontext --version\n…\n$ echo $?\n0\n"))
