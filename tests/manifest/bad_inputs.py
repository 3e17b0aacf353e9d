"""Table of bad manifests, one of each kind, with the message that a run must give.

`python -m tests.manifest.bad_inputs` generates `docs/bad-input.md` from this table.
"""

import gzip
import io
import os
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.references.staging import Staging
from tests.support import pictures
from tests.support.plans import build_plan
from tests.support.served_folder import served_folder

URL = "https://pictures.example.com/cat.jpg"
HEADER = "id,image,prompt\n"
GOOD_ROW = f"good,{URL},oil\n"
TABLE = HEADER + GOOD_ROW
PAGE = Path(__file__).parents[2] / "docs" / "bad-input.md"
INTRODUCTION = """\
# Bad input

`flux-kontext plan` and the start of each run check every row before anything is submitted.
This page shows the message for each kind of bad input.

- A message about the manifest, the styles or the output names stops the run. Nothing is
  submitted.
- A message about rows names each invalid row by its line. With `--skip-invalid`
  (in a flow, `skip_invalid`) these rows are refused and the others are submitted.
- `accepted` marks input that looks wrong but is valid. An id that is not a valid file name is
  made safe.

`python -m tests.manifest.bad_inputs` generates this page from `tests/manifest/bad_inputs.py`.

| input | message |
|---|---|
"""


class BadInput(NamedTuple):
    """A manifest that is bad, or looks bad but is accepted.

    Attributes:
        title: Title of the case, on the page and in test ids.
        file_name: File name of the manifest.
        content: Content of the manifest; None for no file.
        expected: Text that the message must contain; None if the input is accepted.
        style: The style for all rows: a name, or a file beside the manifest.
        styles: Content of the file of styles.
        names: The template of output names.
        picture: Content of the file `x.jpg` beside the manifest, if there is one.
        served: Whether the manifest is read from a web server.
    """

    title: str
    file_name: str
    content: bytes | str | None
    expected: str | None
    style: str | None = None
    styles: str | None = None
    names: str | None = None
    picture: bytes | None = None
    served: bool = False


def csv_row(title, row, expected):
    """Return a CSV manifest with a row between two valid ones."""
    return BadInput(title, "m.csv", f"{HEADER}{GOOD_ROW}{row}\nlast,{URL},ink\n", expected)


def row_id(title, text, expected):
    """Return a CSV manifest with an id."""
    return csv_row(title, f'"{text}",{URL},pencil', expected)


def reference(title, url, expected):
    """Return a CSV manifest with a reference image."""
    return csv_row(title, f'x,"{url}",pencil', expected)


def picture_file(title, content, expected):
    """Return a CSV manifest with an image file beside it."""
    return reference(title, "x.jpg", expected)._replace(picture=content)


def json_line(title, text, expected):
    """Return a JSON Lines manifest with a line between two valid ones."""
    return BadInput(title, "m.jsonl", f'{{"prompt": "a"}}\n{text}\n{{"prompt": "b"}}\n', expected)


def output_name(title, text, expected):
    """Return a CSV manifest with an output name."""
    head = HEADER.replace("\n", ",output\n")
    return BadInput(title, "m.csv", f"{head}good,{URL},oil,good\nx,{URL},ink,{text}\n", expected)


def names_template(title, text, expected):
    """Return a valid manifest with a template of output names."""
    return BadInput(title, "m.csv", f"{HEADER}{GOOD_ROW}x,{URL},ink\n", expected, names=text)


def style_file(title, text, expected):
    """Return a valid manifest with a file of styles."""
    return BadInput(title, "m.csv", TABLE, expected, style="own.yaml", styles=text)


def prompt_template(title, text, expected):
    """Return a CSV manifest with a prompt template."""
    return BadInput(title, "m.csv", f'id,mood,prompt\nx,,"{text}"\n', expected)


def parquet_file(column):
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": column}), file, compression="zstd")
    return file.getvalue()


_LONG = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), ["x" * 1_000_000])

BAD_INPUTS = [
    BadInput("no such file", "none.csv", None, "There is no manifest at"),
    BadInput("an empty file", "m.csv", "", "has no column names"),
    BadInput("a header only", "m.csv", HEADER, "has no rows"),
    BadInput("no header", "m.csv", GOOD_ROW, "header seems to be missing"),
    BadInput("a missing column", "m.csv", f"id,file\n1,{URL}\n", "no column `image` or `prompt`"),
    BadInput("a duplicate column", "m.csv", "id,prompt,prompt\n1,a,b\n", "duplicate columns"),
    BadInput("a column in another case", "m.csv", "ID,Prompt\n1,a\n", "rename it to `id`"),
    row_id("a duplicate id", "good", "first used on line 2"),
    row_id("ids that differ only in case", "GOOD", "first used on line 2"),
    BadInput(
        "ids that differ only in Unicode form",
        "m.csv",
        f"{HEADER}caf\u00e9,{URL},a\ncafe\u0301,{URL},b\n",
        "first used on line 2",
    ),
    csv_row("a blank id", f",{URL},pencil", None),
    row_id("an id of spaces", "   ", None),
    row_id("an id that leads out of the output", "../../etc/passwd", "leads out of the output"),
    row_id("an absolute id", "/etc/passwd", "is an absolute path"),
    row_id("a NUL in an id", "a\0b", "contains a NUL character"),
    row_id("a line end in an id", "a\nb", "an invisible character"),
    row_id("an id of 5,000 characters", "x" * 5_000, "the limit is 200"),
    row_id("an id that Windows reserves", "CON", "is reserved on Windows"),
    row_id("an id with a right-to-left override", "a\u202egpj", "an invisible character"),
    row_id("an id that is a spreadsheet formula", "=cmd|' /C calc'!A0", None),
    BadInput("a byte order mark", "m.csv", (HEADER + GOOD_ROW).encode("utf-8-sig"), None),
    BadInput(
        "UTF-16", "m.csv", (HEADER + GOOD_ROW).encode("utf-16"), "save the manifest as UTF-8"
    ),
    BadInput(
        "UTF-16 without a byte order mark",
        "m.csv",
        (HEADER + GOOD_ROW).encode("utf-16-le"),
        "save the manifest as",
    ),
    BadInput(
        "Latin-1", "m.csv", f"{HEADER}x,{URL},\u00e9t\u00e9\n".encode("latin-1"), "is not UTF-8"
    ),
    csv_row("a row that is too short", f"x,{URL}", "has 2 of 3 cells"),
    csv_row("a row that is too long", f"x,{URL},oil, thick", "1 more cell than columns"),
    csv_row("an unclosed quote", f'x,{URL},"oil', "a quote that is never closed"),
    BadInput(
        "semicolons",
        "m.csv",
        (HEADER + GOOD_ROW).replace(",", ";"),
        None,
    ),
    csv_row("a cell of a megabyte", f"x,{URL},{'x' * 900_000}", "larger than field limit"),
    csv_row("a cell of ten megabytes", f"x,{URL},{'x' * 10_000_000}", "more than 1,000,000 char"),
    BadInput(
        "lines that end in carriage returns",
        "m.csv",
        (HEADER + GOOD_ROW).replace("\n", "\r"),
        None,
    ),
    BadInput(
        "an HTML error page", "m.csv", "<!DOCTYPE html>\n<p>403</p>\n", "an HTML or XML page"
    ),
    reference("a missing local file", "/data/cat.jpg", "'/data/cat.jpg' does not exist"),
    reference("a local folder", "/etc", "is a folder"),
    reference("file: that is not an image", "file:///etc/passwd", "is text by its content"),
    reference(
        "file: in a manifest from the web", "file:///etc/passwd", "is a local file, and"
    )._replace(served=True),
    reference("gist:", "gist://1/cat.jpg", "not an http or https URL"),
    reference("a trailing separator", f"{URL};", "ends with ';'"),
    reference("an escaped query", f"{URL}?a=1&amp;b=2", "replace &amp; by &"),
    reference("text beside a URL", f"cat.jpg ({URL})", "keep only the URL"),
    reference("data:", "data:image/png;base64,AAAA", "not an http or https URL"),
    reference("chained filesystems", "zip://x.jpg::s3://a/b.zip", "not an http or https URL"),
    picture_file("an empty image", b"", "is an empty file"),
    picture_file("an image that is text", b"a cat, in words", "is text by its content"),
    picture_file("an image that is an HTML page", b"<!DOCTYPE html><p>403", "a page of HTML"),
    picture_file("an SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG"),
    picture_file("a GIF", pictures.picture("gif"), "is a GIF"),
    picture_file("a truncated JPEG", pictures.picture()[:-1_000], "is cut off or damaged"),
    picture_file("an image of 11 MB", bytes(11_000_000), "has 11.0 MB; the service takes 10 MB"),
    picture_file(
        "an image of 50,000 x 50,000 pixels",
        pictures.png_that_claims(50_000, 50_000),
        "has 50,000 x 50,000 pixels",
    ),
    reference("ftp:", "ftp://a.example.com/cat.jpg", "not an http or https URL"),
    reference("a cloud's metadata service", "http://169.254.169.254/x", "link-local"),
    reference("a password in a URL", "https://me:word@a.example.com/x", "user name or password"),
    reference("no scheme", "pictures.example.com/cat.jpg", "example.com/cat.jpg' does not exist"),
    reference("a line end in a URL", "https://a.example.com/\r\nx", "an invisible character"),
    json_line("a truncated line", '{"prompt": "x', "is not valid JSON"),
    json_line("an array", '["x"]', "expected an object, got list"),
    json_line("NaN", '{"prompt": "x", "n": NaN}', "NaN is not valid JSON"),
    json_line("a duplicate name", '{"prompt": "x", "prompt": "y"}', "duplicate name prompt"),
    json_line(
        "100,000 nested arrays", '{"prompt": "x", "n": ' + "[" * 100_000, "nested too deeply"
    ),
    BadInput(
        "a number and the same text as ids",
        "m.jsonl",
        '{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n',
        "first used on line 1",
    ),
    json_line(
        "a number of 5,000 digits",
        '{"id": ' + "1" * 5_000 + "}",
        "number with thousands of digits",
    ),
    json_line("half a character", '{"prompt": "\\ud800"}', "contains half a character"),
    BadInput("an array that is cut off", "m.json", '[\n{"prompt": "x"}\n', "has no end"),
    BadInput(
        "a truncated gzip",
        "m.csv.gz",
        gzip.compress((HEADER + GOOD_ROW).encode())[:-9],
        "end-of-stream",
    ),
    BadInput("a gzip bomb", "m.csv.gz", gzip.compress(bytes(30_000_000)), "1,000,000 characters"),
    BadInput("a truncated Parquet", "m.parquet", parquet_file(["x"])[:-9], "cannot be read"),
    BadInput("a Parquet bomb", "m.parquet", parquet_file(_LONG), "a cell of 1,000,000 bytes"),
    output_name("an output name outside the output", "../../x", "leads out of the output"),
    output_name("an absolute output name", "/etc/passwd", "is an absolute path"),
    output_name("an output name with a backslash", "a\\b", "contains a backslash"),
    output_name("an output name that Windows reserves", "nul.jpg", "is reserved on Windows"),
    output_name("an output name of 5,000 characters", "x" * 5_000, "more than 80 characters"),
    output_name("an output name in the ledger", "_ledger/rows/x", "the batch's own _ledger"),
    output_name("an output name of a batch file", "failed.csv", "the batch's own failed.csv"),
    output_name("an output name of another format", "x.png", "output_format is jpeg"),
    output_name("output names that differ only in case", "GOOD.jpg", "first used on line 2"),
    names_template("a template of names with a missing column", "{sku}/{id}.{ext}", "'sku' that"),
    names_template("an invalid template of names", "../{id!r}.jpg", "cannot be used"),
    names_template("one name for all rows", "all.{ext}", "first used on line 2"),
    BadInput("an unknown style", "m.csv", f"image,style\n{URL},watercolor\n", "did you mean"),
    BadInput("an unknown style for all rows", "m.csv", TABLE, "did you mean", style="watercolor"),
    BadInput(
        "a missing file of styles", "m.csv", TABLE, "There are no styles at", style="none.yaml"
    ),
    style_file("styles that are a list", "- ink\n", "are not a mapping"),
    style_file("a style with an unknown field", "ink: {prompt: x, size: 9}", "no field `size`"),
    style_file("a style with an unknown ratio", "a: {prompt: x, aspect_ratio: '2:1'}", "'match'"),
    style_file("a duplicate style", "ink: x\nink: y\n", "it names 'ink' twice"),
    style_file("a style outside the output", "../ink: x\n", "the name leads out"),
    style_file("a YAML bomb", "a: &a [x]\nb: &b [*a, *a]\nc: [*b]\n", "aliases (`*`) are not"),
    style_file(
        "an object in YAML", "a: !!python/object/apply:os.getcwd []", "could not determine"
    ),
    style_file("a file of styles of 2 MB", f"ink: {'x' * 2_000_000}", "more than 1,000,000 bytes"),
    prompt_template(
        "a template with a missing column", "{{ colour }}", "no column 'colour'; there are id"
    ),
    prompt_template(
        "a template with an empty cell", "a {{ mood }} cat", "the column 'mood' is empty"
    ),
    BadInput(
        "a template with a missing value",
        "m.csv",
        "id,colour,prompt\nx,nan,a {{ colour }} cat\n",
        "the column 'colour' is 'nan', a missing value",
    ),
    prompt_template("an endless loop", "{% for x in range(9**9) %}x{% endfor %}", "uses a loop"),
    prompt_template("a template that calls", "{{ lipsum() }}", "uses a call"),
    prompt_template("a template with an attribute", "{{ id.__class__ }}", "attribute access"),
    prompt_template("a template that makes a gigabyte", "{{ 'x' * 10**9 }}", "uses arithmetic"),
    prompt_template("a nested bomb", "{{ " + "(" * 9_000, "nested too deeply"),
    prompt_template("a template of itself", "{{ prompt }}{{ prompt }}", "cannot contain itself"),
    prompt_template("an unclosed template", "a {{ colour", "cannot be read"),
    BadInput("a folder without images", "photos/", None, "There are no images at", style="oil"),
    BadInput("images without a prompt", "more/x.jpg", b"\xff\xd8", "need a prompt or a style"),
    csv_row("an empty prompt", f"x,{URL},", "prompt is missing"),
    csv_row("a prompt that is a missing value", f"x,{URL},nan", "prompt is 'nan', a missing"),
    csv_row("a prompt that a spreadsheet failed to make", f"x,{URL},#REF!", "prompt is '#REF!'"),
    csv_row("a prompt that is the URL of an image", f"x,,{URL}", "move it to a column `image`"),
    csv_row(
        "a prompt of 10,001 characters", f"x,{URL},{'x' * 10_001}", "at most 10000 characters"
    ),
    BadInput("an unknown mode", "m.csv", "prompt,mode\nx,turbo\n", "should be 'pro' or 'max'"),
    BadInput(
        "several references in a row",
        "m.jsonl",
        f'{{"prompt": "x", "images": ["{URL}", "{URL}?2"]}}',
        "the service takes one",
    ),
    BadInput(
        "a match without a reference",
        "m.csv",
        "prompt,aspect_ratio\nx,match\n",
        "needs a reference image",
    ),
    BadInput("an unknown ratio", "m.csv", "prompt,aspect_ratio\nx,2:1\n", "should be 'match'"),
    BadInput("an unknown format", "m.csv", "prompt,output_format\nx,gif\n", "'jpeg' or 'png'"),
    BadInput("an unknown provider", "m.csv", "prompt,provider\nx,best\n", "should be 'auto'"),
]


def get_message(bad, folder):
    """Return the message of a plan for the input, or None if the plan accepts it."""
    path = Path(folder) / bad.file_name
    path.parent.mkdir(exist_ok=True)
    if bad.content is not None:
        content = bad.content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if bad.file_name.endswith("/"):
        path.mkdir()
    if bad.styles is not None:
        (Path(folder) / bad.style).write_text(bad.styles)
    if bad.picture is not None:
        (Path(folder) / "x.jpg").write_bytes(bad.picture)
    references = References(Staging(f"{folder}/staged", "https://staged.example.com"))
    try:
        with (
            served_folder(folder) if bad.served else nullcontext() as served,
            # The service is on this machine too, so that a manifest may be there.
            patch.dict(os.environ, {"FLUX_KONTEXT_BASE_URL": served} if served else {}),
        ):
            url = f"{served}/{bad.file_name}" if served else manifest_path(bad, folder)
            made = Manifest(url, styles=style_option(bad, folder), names=bad.names)
            build_plan(made, references=references).check(skip_invalid=False)
    except FluxKontextError as error:
        return error.message
    return None


def manifest_path(bad, folder):
    """Return the manifest to pass: for an image, its folder."""
    return str(Path(folder) / bad.file_name.removesuffix("x.jpg"))


def style_option(bad, folder):
    """Return the style to pass: for a file, its path."""
    if bad.style is None or "." not in bad.style:
        return bad.style
    return str(Path(folder) / bad.style)


def render_page():
    """Return the page with the message of every input."""
    rows = []
    for bad in BAD_INPUTS:
        with tempfile.TemporaryDirectory() as folder:
            message = get_message(bad, folder)
            shown = "accepted" if message is None else message.replace(f"{folder}/", "")
            shown = re.sub(r"http://127\.0\.0\.1:\d+/", "https://example.com/", shown)
        # Every message about rows ends with the same advice.
        shown = " ".join(shown.partition("\nFix them")[0].split()).replace("|", "\\|")
        rows.append(f"| {bad.title} | {shown if len(shown) < 400 else shown[:400] + '…'} |")
    return INTRODUCTION + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
