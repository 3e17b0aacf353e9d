"""Follow a page block by block in a folder of its own."""

import ast
import asyncio
import inspect
import tomllib

from tests.docs import data

SHOWN_LANGUAGES = ("", "text")
"""Languages that are only shown: drawings and syntax."""
SPHINX_DIRECTIVES = ("{eval-rst}", "{include}", "{toctree}")


class Reader:
    """Follows one page.

    Args:
        folder: The working directory.
        terminal: Runs commands.
    """

    def __init__(self, folder, terminal):
        self._folder = folder
        self._terminal = terminal
        self._names = {"__name__": "__main__"}

    def follow(self, block):
        """Save, run or load a block, and raise if it fails."""
        text = self._terminal.localize(block.text)
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
                pass  # the page's commands read it with their own columns
            case "csv" | "jsonl":
                data.check_manifest(text, block.language, self._folder)
            case "yaml":
                data.check_yaml(text, self._folder)
            case "json":
                data.check_storage_options(text)
            case "toml":
                tomllib.loads(text)
            case "nginx":
                # Run by tests/callbacks/test_nginx.py, which takes it from this page.
                assert block.page == "docs/callbacks.md"
            case language:
                assert language in (*SHOWN_LANGUAGES, *SPHINX_DIRECTIVES), (
                    f"nothing runs {language}"
                )
                assert "$ " not in text, "commands are `console`"

    def _run(self, text, name):
        path = self._folder / name
        path.write_text(text, encoding="utf-8")
        code = compile(text, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, self._names)
        if inspect.iscoroutine(result):
            asyncio.run(result)
