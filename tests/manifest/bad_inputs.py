"""Bad manifests, one of each kind: what is in them and what a run must say of them.

`docs/bad-input.md` is written from this table: `python -m tests.manifest.bad_inputs`.
"""

import gzip
import io
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

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
HEAD = "id,image,prompt\n"
GOOD = f"good,{URL},oil\n"
TABLE = HEAD + GOOD
PAGE = Path(__file__).parents[2] / "docs" / "bad-input.md"


class Bad(NamedTuple):
    """A bad manifest.

    Attributes:
        what: Names it.
        name: Its file name.
        content: Its bytes or text; None for no file at all.
        told: A part of the message; None where the input is fine after all.
        style: The style for all rows: a name, or a file beside it.
        styles: What is in that file.
        names: The template of output names.
        picture: What is in the file `x.jpg` beside it, if there is one.
        served: The manifest comes from the web.
    """

    what: str
    name: str
    content: bytes | str | None
    told: str | None
    style: str | None = None
    styles: str | None = None
    names: str | None = None
    picture: bytes | None = None
    served: bool = False


def csv(what, row, told):
    """A row of CSV between two good ones."""
    return Bad(what, "m.csv", f"{HEAD}{GOOD}{row}\nlast,{URL},ink\n", told)


def ident(what, text, told):
    """An id."""
    return csv(what, f'"{text}",{URL},pencil', told)


def reference(what, url, told):
    """A reference image."""
    return csv(what, f'x,"{url}",pencil', told)


def picture_file(what, content, told):
    """A file of an image beside the manifest."""
    return reference(what, "x.jpg", told)._replace(picture=content)


def line(what, text, told):
    """A line of JSON between two good ones."""
    return Bad(what, "m.jsonl", f'{{"prompt": "a"}}\n{text}\n{{"prompt": "b"}}\n', told)


def output(what, text, told):
    """An output name."""
    head = HEAD.replace("\n", ",output\n")
    return Bad(what, "m.csv", f"{head}good,{URL},oil,good\nx,{URL},ink,{text}\n", told)


def names(what, text, told):
    """A template of output names."""
    return Bad(what, "m.csv", f"{HEAD}{GOOD}x,{URL},ink\n", told, names=text)


def styles(what, text, told):
    """A file of styles."""
    return Bad(what, "m.csv", TABLE, told, style="own.yaml", styles=text)


def template(what, text, told):
    """A prompt that is a template."""
    return Bad(what, "m.csv", f'id,mood,prompt\nx,,"{text}"\n', told)


def parquet(column):
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": column}), file, compression="zstd")
    return file.getvalue()


_LONG = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), ["x" * 1_000_000])

BAD = [
    Bad("no such file", "none.csv", None, "There is no manifest at"),
    Bad("an empty file", "m.csv", "", "names nothing"),
    Bad("a header only", "m.csv", HEAD, "has no rows"),
    Bad("no header", "m.csv", GOOD, "It seems to have no line of column names"),
    Bad("a missing column", "m.csv", f"id,file\n1,{URL}\n", "neither a column `image` nor"),
    Bad("a column twice", "m.csv", "id,prompt,prompt\n1,a,b\n", "has a column twice"),
    Bad("a column in other letters", "m.csv", "ID,Prompt\n1,a\n", "spell it `id`"),
    ident("an id twice", "good", "is on line 2 already"),
    ident("ids equal but for case", "GOOD", "is on line 2 already"),
    Bad(
        "ids equal but for their Unicode form",
        "m.csv",
        f"{HEAD}caf\u00e9,{URL},a\ncafe\u0301,{URL},b\n",
        "is on line 2 already",
    ),
    csv("a blank id", f",{URL},pencil", None),
    ident("an id of spaces", "   ", None),
    ident("an id that leads out", "../../etc/passwd", "leads out of the output"),
    ident("an absolute id", "/etc/passwd", "is an absolute path"),
    ident("a NUL in an id", "a\0b", "holds a NUL character"),
    ident("a line end in an id", "a\nb", "cannot be seen"),
    ident("an id of 5,000 characters", "x" * 5_000, "has at most 200"),
    ident("an id that Windows reserves", "CON", "is reserved on Windows"),
    ident("an id that turns the text around", "a\u202egpj", "cannot be seen"),
    ident("an id that spreadsheets compute", "=cmd|' /C calc'!A0", None),
    Bad("a byte order mark", "m.csv", (HEAD + GOOD).encode("utf-8-sig"), None),
    Bad("UTF-16", "m.csv", (HEAD + GOOD).encode("utf-16"), "save the manifest as UTF-8"),
    Bad("UTF-16 unmarked", "m.csv", (HEAD + GOOD).encode("utf-16-le"), "save the manifest as"),
    Bad("Latin-1", "m.csv", f"{HEAD}x,{URL},\u00e9t\u00e9\n".encode("latin-1"), "not in UTF-8"),
    csv("a row that is too short", f"x,{URL}", "2 cells where there are 3 columns"),
    csv("a row that is too long", f"x,{URL},oil, thick", "1 cells more than there are"),
    csv("a quote that never ends", f'x,{URL},"oil', "a quote that is never closed"),
    Bad("semicolons", "m.csv", (HEAD + GOOD).replace(",", ";"), "separated by semicolons"),
    csv("a cell of a megabyte", f"x,{URL},{'x' * 900_000}", "larger than field limit"),
    csv("a cell of ten megabytes", f"x,{URL},{'x' * 10_000_000}", "more than 1,000,000 char"),
    Bad("carriage returns alone", "m.csv", (HEAD + GOOD).replace("\n", "\r"), None),
    Bad("an HTML error page", "m.csv", "<!DOCTYPE html>\n<p>403</p>\n", "a page of HTML"),
    reference("a local file that is not there", "/data/cat.jpg", "'/data/cat.jpg' does not exist"),
    reference("a local folder", "/etc", "is a folder"),
    reference("file: of no image", "file:///etc/passwd", "is text by its content"),
    reference(
        "file: in a manifest from the web", "file:///etc/passwd", "is a local file, and"
    )._replace(served=True),
    reference("gist:", "gist://1/cat.jpg", "not an http or https URL"),
    reference("data:", "data:image/png;base64,AAAA", "not an http or https URL"),
    reference("filesystems in a chain", "zip://x.jpg::s3://a/b.zip", "not an http or https URL"),
    picture_file("an empty image", b"", "is an empty file"),
    picture_file("an image that is text", b"a cat, in words", "is text by its content"),
    picture_file("an image that is a page of HTML", b"<!DOCTYPE html><p>403", "a page of HTML"),
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
    reference("a line end in a URL", "https://a.example.com/\r\nx", "cannot be seen"),
    line("a torn last line", '{"prompt": "x', "is not JSON"),
    line("an array", '["x"]', "is not an object but list"),
    line("NaN", '{"prompt": "x", "n": NaN}', "NaN is not JSON"),
    line("a name twice", '{"prompt": "x", "prompt": "y"}', "it names prompt twice"),
    line("100,000 levels", '{"prompt": "x", "n": ' + "[" * 100_000, "nested too deeply"),
    Bad(
        "a number and its text as ids",
        "m.jsonl",
        '{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n',
        "is on line 1 already",
    ),
    line(
        "a number of 5,000 digits", '{"id": ' + "1" * 5_000 + "}", "number of thousands of digits"
    ),
    line("half a character", '{"prompt": "\\ud800"}', "holds half a character"),
    Bad("JSON over several lines", "m.json", '[\n{"prompt": "x"}\n]\n', "JSON over several"),
    Bad(
        "a truncated gzip", "m.csv.gz", gzip.compress((HEAD + GOOD).encode())[:-9], "end-of-stream"
    ),
    Bad("a gzip bomb", "m.csv.gz", gzip.compress(bytes(30_000_000)), "1,000,000 characters"),
    Bad("a truncated Parquet", "m.parquet", parquet(["x"])[:-9], "cannot be read"),
    Bad("a Parquet bomb", "m.parquet", parquet(_LONG), "a cell of 1,000,000 bytes"),
    output("an output name that leads out", "../../etc/passwd", "leads out of the output"),
    output("an absolute output name", "/etc/passwd", "is an absolute path"),
    output("an output name with a backslash", "a\\b", "holds a backslash"),
    output("an output name that Windows reserves", "nul.jpg", "is reserved on Windows"),
    output("an output name of 5,000 characters", "x" * 5_000, "more than 80 characters"),
    output("an output name in the ledger", "_ledger/rows/x", "the batch's own _ledger"),
    output("an output name of a file of ours", "failed.csv", "the batch's own failed.csv"),
    output("an output name of another kind", "x.png", "is not jpeg"),
    output("output names equal but for case", "GOOD.jpg", "is that of line 2 already"),
    names("names by a column that is not there", "{sku}/{id}.{ext}", "need a column 'sku'"),
    names("names that are no template", "../{id!r}.jpg", "cannot be used"),
    names("one name for all rows", "all.{ext}", "is that of line 2 already"),
    Bad("an unknown style", "m.csv", f"image,style\n{URL},watercolor\n", "did you mean"),
    Bad("an unknown style for all rows", "m.csv", TABLE, "did you mean", style="watercolor"),
    Bad("no such file of styles", "m.csv", TABLE, "There are no styles at", style="none.yaml"),
    styles("styles that are a list", "- ink\n", "are not a mapping"),
    styles("a style with an unknown field", "ink: {prompt: x, size: 9}", "no field `size`"),
    styles("a style with an unknown ratio", "a: {prompt: x, aspect_ratio: '2:1'}", "'21:9'"),
    styles("a style twice", "ink: x\nink: y\n", "it names 'ink' twice"),
    styles("a style that leads out", "../ink: x\n", "the name leads out"),
    styles("a bomb of YAML", "a: &a [x]\nb: &b [*a, *a]\nc: [*b]\n", "aliases (`*`) are not"),
    styles("an object in YAML", "a: !!python/object/apply:os.getcwd []", "could not determine"),
    styles("styles of two megabytes", f"ink: {'x' * 2_000_000}", "more than 1,000,000 bytes"),
    template("a template of a missing column", "{{ colour }}", "no column 'colour'; there are id"),
    template("a template of an empty cell", "a {{ mood }} cat", "the column 'mood' is empty"),
    template("an endless loop", "{% for x in range(9**9) %}x{% endfor %}", "uses a loop"),
    template("a template that calls", "{{ lipsum() }}", "uses a call"),
    template("a template that reaches inside", "{{ id.__class__ }}", "attribute access"),
    template("a template of a gigabyte", "{{ 'x' * 10**9 }}", "uses arithmetic"),
    template("a nested bomb", "{{ " + "(" * 9_000, "nested too deeply"),
    template("a template that holds itself", "{{ prompt }}{{ prompt }}", "cannot hold itself"),
    template("a template that is not closed", "a {{ colour", "cannot be read"),
    Bad("a folder without images", "photos/", None, "There are no images at", style="oil"),
    Bad("images without a prompt", "more/x.jpg", b"\xff\xd8", "need a prompt or styles"),
    csv("an empty prompt", f"x,{URL},", "prompt is missing"),
    csv("a prompt of 10,001 characters", f"x,{URL},{'x' * 10_001}", "at most 10000 characters"),
    Bad("an unknown mode", "m.csv", "prompt,mode\nx,turbo\n", "should be 'pro' or 'max'"),
    Bad("an unknown ratio", "m.csv", "prompt,aspect_ratio\nx,2:1\n", "should be '21:9'"),
    Bad("an unknown format", "m.csv", "prompt,output_format\nx,gif\n", "'jpeg' or 'png'"),
    Bad("an unknown provider", "m.csv", "prompt,provider\nx,best\n", "should be 'auto'"),
]


def message(bad, folder):
    """What a run says of it before anything is submitted; None where it would go on."""
    path = Path(folder) / bad.name
    path.parent.mkdir(exist_ok=True)
    if bad.content is not None:
        content = bad.content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if bad.name.endswith("/"):
        path.mkdir()
    if bad.styles is not None:
        (Path(folder) / bad.style).write_text(bad.styles)
    if bad.picture is not None:
        (Path(folder) / "x.jpg").write_bytes(bad.picture)
    references = References(Staging(f"{folder}/staged", "https://staged.example.com"))
    try:
        with served_folder(folder) if bad.served else nullcontext() as served:
            url = f"{served}/{bad.name}" if served else manifest_of(bad, folder)
            made = Manifest(url, styles=style_of(bad, folder), names=bad.names)
            build_plan(made, references=references).check(skip_invalid=False)
    except FluxKontextError as error:
        return error.message
    return None


def manifest_of(bad, folder):
    """What to give as the manifest: of an image its folder."""
    return str(Path(folder) / bad.name.removesuffix("x.jpg"))


def style_of(bad, folder):
    """What to give as the style: a file by its path."""
    if bad.style is None or "." not in bad.style:
        return bad.style
    return str(Path(folder) / bad.style)


def page():
    """The table as a page."""
    rows = []
    for bad in BAD:
        with tempfile.TemporaryDirectory() as folder:
            told = message(bad, folder)
            shown = "accepted" if told is None else told.replace(f"{folder}/", "")
            shown = re.sub(r"http://127\.0\.0\.1:\d+/", "https://example.com/", shown)
        shown = shown.partition(" Mend them")[0].partition("Mend them.")[0].strip()
        shown = shown.replace("\n", " ").replace("|", "\\|")
        rows.append(f"| {bad.what} | {shown if len(shown) < 400 else shown[:400] + '…'} |")
    head = (
        "# Bad input, and what is said of it\n\nEach of these is known before anything is "
        "submitted, and in a run that skips invalid\nrows only the rows named are left out. "
        "Ids that are accepted are made safe as file names.\nWritten from the table of "
        "`tests/manifest/bad_inputs.py` by `python -m tests.manifest.bad_inputs`.\n\n"
        "| input | message |\n|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
