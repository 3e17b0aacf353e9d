"""The argument parser of all commands: strict, because a misread option may cost money."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes each option once, by its whole name, and no empty value.

    An abbreviation or a repeated option could silently replace what was meant. An empty value is
    mostly an unset variable of the shell.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self.register("action", "append", _AppendValue)


class _StoreOnce(argparse._StoreAction):  # noqa: SLF001 - argparse has no public base for it
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        _check_not_empty(self, values)
        given = namespace.__dict__.setdefault("_given", set())
        if option_string is not None and self.dest in given:
            raise argparse.ArgumentError(self, "given more than once")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


class _AppendValue(argparse._AppendAction):  # noqa: SLF001 - as above
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        _check_not_empty(self, values)
        super().__call__(parser, namespace, values, option_string)


def _check_not_empty(action: argparse.Action, value: Any) -> None:
    if isinstance(value, str) and not value.strip():
        raise argparse.ArgumentError(action, "the value is empty; is a shell variable unset?")
