"""The values of a JSON text of any layout, one by one, in bounded memory."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import MAX_LINE_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Iterator

# The text of a JSON file that is looked at together.
_PIECE_CHARACTERS = 65_536
_JSON_VALUE = re.compile(r"[^\s,]")
# Finds where values end. Their numbers are read later, so long ones cost no time here.
_JSON_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)


def split_values(pieces: Iterator[str], url: str, line: int) -> Iterator[tuple[int, str]]:
    """Yield the values of a JSON array, or of JSON values one after another, from a text's pieces.

    The text starts on `line`. A value is numbered by the line that it ends on, or by its place if
    that is higher. Memory is bounded by the limit for a line, which each value has to keep.
    """
    text = _take(pieces, _PIECE_CHARACTERS).lstrip()
    is_array = text.startswith("[")
    at, number = int(is_array), line - 1
    while True:
        start, found = at, _JSON_VALUE.search(text, at)
        at = found.start() if found else len(text)
        line += text.count("\n", start, at)
        if is_array and text.startswith("]", at):
            if any(map(str.strip, itertools.chain([text[at + 1 :]], pieces))):
                raise ManifestError(f"The manifest {url} goes on after its JSON array.")
            return
        end, problem = _find_value_end(text, at)
        # The end of the text may be in the middle of a value.
        if end in (None, len(text)) and (
            more := _take(pieces, max(_PIECE_CHARACTERS, len(text) - at))
        ):
            if len(text) - at > MAX_LINE_CHARACTERS:
                raise ManifestError(
                    f"The value that starts on line {line} of {url} is not valid JSON, or has "
                    f"more than {MAX_LINE_CHARACTERS:,} characters."
                )
            text, at = text[at:] + more, 0
            continue
        if at == len(text) and not is_array:
            return
        if end is None:
            problem = (
                problem if at < len(text) else "the array has no end; the file may be cut off"
            )
            raise ManifestError(f"Line {line} of {url} is not valid JSON: {problem}.")
        line += text.count("\n", at, end)
        number = max(number + 1, line)
        yield number, text[at:end]
        at = end


def _find_value_end(text: str, at: int) -> tuple[int | None, str]:
    """Return where the JSON value that starts at a position ends, or None and why it does not."""
    try:
        return _JSON_DECODER.raw_decode(text, at)[1], ""
    except json.JSONDecodeError as error:
        return None, error.msg
    except RecursionError:
        return None, "it is nested too deeply"


def _take(pieces: Iterator[str], characters: int) -> str:
    """Return the next pieces of a text, with at least this many characters if there are."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size >= characters:
            break
    return "".join(taken)
