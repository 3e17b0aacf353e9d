"""Every manifest format gives the same rows, and names invalid rows by their own numbers."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest import formats, reader
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from tests.support.plans import build_plan

URL = "http://references.test/cat.jpg"
ROWS = [
    {"id": "cat", "image": URL, "prompt": "oil", "mode": "max", "sku": "7"},
    {"id": "dog", "image": URL, "prompt": "pencil", "mode": "pro", "sku": "8"},
]
CSV = "\n".join([",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]) + "\n"
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def zst(data):
    return zstandard.compress(data)


FILES = {
    "m.csv": CSV.encode(),
    "m": CSV.encode(),
    "m.tsv": CSV.replace(",", "\t").encode(),
    "m.jsonl": JSONL.encode(),
    "m.ndjson": JSONL.encode("utf-8-sig"),
    "m.json": JSONL.replace("\n", "\n\n").encode(),
    "array.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2).encode("utf-8-sig"),
    "indented-by-tabs.json.gz": gzip.compress(json.dumps(ROWS, indent="\t").encode()),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "a-row-a-line.json": f"\n[\n{json.dumps(ROWS[0])},\r\n{json.dumps(ROWS[1])},\n]\n".encode(),
    "leading-commas.json": f"[ {json.dumps(ROWS[0])}\n, {json.dumps(ROWS[1])} ]".encode(),
    "semicolons.csv": CSV.replace(",", ";").encode("utf-8-sig"),
    "tabs.csv": CSV.replace(",", "\t").encode(),
    "commas.tsv": CSV.encode(),
    "semicolons.csv.gz": gzip.compress(CSV.replace(",", ";").encode()),
    "m.csv.gz": gzip.compress(CSV.encode(), mtime=0),
    "two-members.csv.gz": gzip.compress(CSV[:40].encode(), mtime=0)
    + gzip.compress(CSV[40:].encode()),
    "m.csv.zst": zst(CSV.encode()),
    "two-frames.csv.zst": zst(CSV[:40].encode()) + zst(CSV[40:].encode()),
    "m.CSV.BZ2": bz2.compress(CSV.encode()),
    "m.jsonl.xz": lzma.compress(JSONL.encode()),
}


@pytest.fixture
def manifest(tmp_path):
    """Return a function that writes a manifest file and opens it."""

    def write(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Manifest(str(path), **options)

    return write


def rows(made):
    return [(row.id, row.request.prompt, row.request.mode, row.cells["sku"]) for row in made]


def refused(manifest):
    return [(row.line, row.reason) for row in manifest.rows() if isinstance(row, RefusedRow)]


def problem(manifest):
    with pytest.raises(ManifestError) as caught:
        build_plan(manifest)
    assert manifest.url in caught.value.message
    return caught.value.message


EXPECTED = [("cat", "oil", "max", "7"), ("dog", "pencil", "pro", "8")]


@pytest.mark.parametrize("name", FILES)
def test_file_name_decides_the_format(manifest, name):
    assert rows(manifest(name, FILES[name]).rows()) == EXPECTED


def test_parquet_rows_are_numbered_from_one(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    made = Manifest(str(path))
    assert rows(made.rows()) == EXPECTED
    assert [row.line for row in made.rows()] == [1, 2]


@pytest.mark.parametrize(
    "given",
    [ROWS, tuple(ROWS), pa.Table.from_pylist(ROWS), pl.DataFrame(ROWS), pd.DataFrame(ROWS)],
    ids=["dicts", "tuple", "arrow", "polars", "pandas"],
)
def test_rows_in_memory_can_be_read_repeatedly(given):
    made = Manifest(given)
    assert rows(made.rows()) == rows(made.rows()) == EXPECTED


def test_columns_are_mapped_to_standard_names():
    given = [{"sku": 5, "photo": URL, "text": "oil"}, {"sku": 6, "photo": URL, "text": "ink"}]
    made = Manifest(given, columns={"image": "photo", "prompt": "text", "id": "sku"})
    assert [(row.id, row.request.prompt) for row in made.rows()] == [("5", "oil"), ("6", "ink")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": "photo"}, "no column 'photo' to use as 'image'; its columns are id, image"),
        ({"picture": "image"}, "Cannot map a column to 'picture'; the standard columns are"),
    ],
)
def test_invalid_column_mapping_is_refused(manifest, columns, expected):
    with pytest.raises(ManifestError, match=expected):
        build_plan(manifest("m.csv", CSV, columns=columns))


def test_mapped_column_in_no_object_is_refused(manifest):
    made = manifest("m.jsonl", JSONL, columns={"provider": "route"})
    assert "has a column route, which --columns names" in problem(made)


def test_typed_values_become_csv_text():
    given = [{"id": 1, "prompt": "x", "n": 2.5, "b": True, "none": None, "many": ["a", {"é": 1}]}]
    (row,) = Manifest(given).rows()
    assert row.cells == {
        "id": "1",
        "prompt": "x",
        "n": "2.5",
        "b": "true",
        "none": "",
        "many": '["a", {"é": 1}]',
    }


def test_number_and_its_text_are_the_same_id():
    given = [{"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"}]
    assert "duplicate id '1', first used on line 1" in refused(Manifest(given))[0][1]


def test_list_column_gives_the_reference():
    table = pa.table({"prompt": ["x", "x"], "images": [[URL], [URL, "http://a.test/b.jpg"]]})
    one, several = Manifest(table).rows()
    assert one.request.image_urls == [URL]
    assert "the row has 2 reference images" in several.reason


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x"', "the line is not valid JSON: Expecting ',' delimiter at character 15"),
        ('["x"]', "expected an object, got list"),
        ('{"prompt": "x", "n": NaN}', "NaN is not valid JSON"),
        ('{"prompt": "x", "prompt": "y"}', "duplicate name prompt"),
        ('{"prompt": "x", "n": ' + "[" * 100_000 + "}", "nested too deeply"),
        ('{"prompt": "x", "n": ' + "1" * 5_000 + "}", "a number with thousands of digits"),
        ('{"prompt": "\\ud800"}', "prompt contains half a character"),
        ('{"prompt": "a\\u0000b"}', "prompt contains a NUL character"),
        ('{"prompt": "' + "x" * 200_000 + '"}', "prompt has 200,000 characters"),
        ('{"name": "x"}', "no column `image` or `prompt`"),
        ('{"Prompt": "x"}', "has a column 'Prompt'; rename it to `prompt`"),
    ],
)
def test_invalid_json_line_is_refused_alone(manifest, line, expected):
    made = manifest("m.jsonl", f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    ((number, reason),) = refused(made)
    assert number == 2
    assert expected in reason
    assert build_plan(made).rows == 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.json", '[\n{"prompt": "x"}\n', "Line 3 of .* the array has no end"),
        ("m.json", '[\n{"prompt": "x"},\n{"prompt": ]', "Line 3 of .* not valid JSON: Expecting"),
        ("m.json", '[{"prompt": "x"}]\n[]', "goes on after its JSON array"),
        ("m.json", '[{"prompt": "' + 3_000_000 * "x" + '"}]', "starts on line 1 .* 1,000,000"),
        ("m.json", 100_000 * "[", "nested too deeply"),
        ("m.jsonl", JSONL.encode("utf-16"), "not JSON Lines in UTF-8"),
        ("m.jsonl", "<html></html>", "not JSON Lines"),
        ("m.jsonl", '{"prompt": "' + "x" * 1_000_001, "Line 1 .*more than 1,000,000 characters"),
        ("m.jsonl", "", "has no rows"),
        (
            "m.csv.gz",
            gzip.compress(CSV.encode() * 9, mtime=0)[:-9],
            "ended before the end-of-stream",
        ),
        ("m.csv.gz", CSV, "[Nn]ot a gzipped file"),
        ("m.csv.zst", zst(CSV.encode())[:-5], "is truncated"),
        ("m.csv.zst", CSV, "cannot be read"),
        ("m.parquet", b"PAR1" + bytes(100), "cannot be read"),
        ("m.parquet", "", "cannot be read"),
        ("m.parquet.gz", gzip.compress(b"PAR1", mtime=0), "decompress it"),
        ("m.parquet", CSV, "cannot be read"),
    ],
)
def test_file_of_another_format_is_refused(manifest, name, content, expected):
    import re  # noqa: PLC0415

    assert re.search(expected, problem(manifest(name, content)))


def test_truncated_parquet_file_is_refused(tmp_path, manifest):
    path = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert "cannot be read" in problem(manifest("cut.parquet", path.read_bytes()[:-20]))


def test_chained_filesystems_are_refused():
    assert "chains several" in problem(Manifest("simplecache::memory://m.csv"))


def test_unsupported_source_is_refused():
    with pytest.raises(ManifestError, match="not int"):
        build_plan(Manifest(7))


def test_parquet_bomb_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "bomb.parquet"
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 5_000, pa.int32()), ["x" * 1_000_000])
    pq.write_table(pa.table({"id": range(5_000), "prompt": long}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert "a cell of 1,000,000 bytes in column prompt" in problem(Manifest(str(path)))
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() < 100e6


def test_decompression_bomb_is_refused(manifest, monkeypatch):
    monkeypatch.setattr(formats, "_BOMB_MIN_CHARACTERS", 10_000_000)
    line = b"," + b"x" * 200 + b"\n"
    bomb = manifest("m.csv.gz", gzip.compress(b"id,prompt\n" + line * 60_000, mtime=0))
    assert "decompresses to more than" in problem(bomb)


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setattr(reader, "MAX_ROWS", 3)
    assert "more than 3 rows" in problem(Manifest([{"prompt": "x"}] * 4))


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("pyarrow", "m.parquet", "parquet"), ("zstandard", "m.csv.zst", "zstd")],
)
def test_missing_extra_is_named(tmp_path, module, name, extra):
    (tmp_path / name).write_bytes(b"x")
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from prefect_flux_kontext.manifest.reader import Manifest\n"
        "try:\n"
        f"    list(Manifest({str(tmp_path / name)!r}).rows())\n"
        "except Exception as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"install `prefect-flux-kontext[{extra}]`" in done.stdout


def test_valid_dicts_become_rows():
    assert all(isinstance(row, Row) for row in Manifest(ROWS).rows())
