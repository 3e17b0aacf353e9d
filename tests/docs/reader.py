"""A reader who does what a page says, block after block, in a folder of their own."""

import ast
import asyncio
import inspect
import tomllib

from tests.docs import data

SHOWN = ("", "text")
"""Languages of what is only looked at: pictures of letters, forms of spelling."""
SPHINX = ("{eval-rst}", "{include}", "{toctree}")


class Reader:
    """Follows one page.

    Args:
        folder: Where the reader is; it is the working directory.
        terminal: Where the reader types commands.
    """

    def __init__(self, folder, terminal):
        self._folder = folder
        self._terminal = terminal
        self._names = {"__name__": "__main__"}

    def follow(self, block):
        """Save, run or load a block; whatever is wrong with it is raised."""
        text = self._terminal.here(block.text)
        if block.file:
            path = self._folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        match block.language:
            case "console":
                self._terminal.follow(block.text)
            case "python":
                self._run(text, f"{block.page.replace('/', '-')}-{block.line}.py")
            case "csv" | "jsonl" if block.file:
                pass  # the page's own commands read it, and its columns may have other names
            case "csv" | "jsonl":
                data.check_manifest(text, block.language, self._folder)
            case "yaml":
                data.check_yaml(text, self._folder)
            case "json":
                data.check_storage_options(text)
            case "toml":
                tomllib.loads(text)
            case "nginx":
                # Run by tests/callbacks/test_nginx.py, which takes it from this very page.
                assert block.page == "docs/callbacks.md"
            case language:
                assert language in (*SHOWN, *SPHINX), f"nothing runs {language}"
                assert "$ " not in text, "commands are `console`"

    def _run(self, text, name):
        path = self._folder / name
        path.write_text(text, encoding="utf-8")
        code = compile(text, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        left = eval(code, self._names)
        if inspect.iscoroutine(left):
            asyncio.run(left)
