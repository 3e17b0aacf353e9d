"""Any bytes give rows, refused rows or a ManifestError, and written manifests are read back."""

import contextlib
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row

URL = "http://references.test/cat.jpg"
HEADER = ("id", "prompt", "mode", "sku")
CELLS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12
)
LINES = st.lists(
    st.tuples(CELLS, CELLS, st.sampled_from(["", "pro", "max"]), CELLS), min_size=1, max_size=4
)


def as_csv(lines):
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *lines])
    return text.getvalue().encode()


def as_json_lines(lines):
    return "".join(
        json.dumps(dict(zip(HEADER, line, strict=True))) + "\n" for line in lines
    ).encode()


def as_parquet(lines):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    columns = zip(HEADER, zip(*lines, strict=True), strict=True)
    pq.write_table(pa.table({name: list(values) for name, values in columns}), file)
    return file.getvalue()


KINDS = {
    "m.csv": as_csv,
    "m.jsonl": as_json_lines,
    "m.parquet": as_parquet,
    "m.csv.gz": lambda lines: gzip.compress(as_csv(lines)),
}


def rows_of(name, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        return list(Manifest(str(path)).rows())


def read_or_refuse(name, data):
    """Read a manifest. Any error other than a ManifestError fails the test."""
    with contextlib.suppress(ManifestError):
        assert all(isinstance(row, Row | RefusedRow) for row in rows_of(name, data))


@pytest.mark.parametrize("name", [*KINDS, "m.tsv", "m.jsonl.gz", "m"])
@settings(max_examples=40)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(name, data):
    read_or_refuse(name, data)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40)
@given(lines=LINES, cuts=st.data())
def test_damaged_manifest_is_read_or_refused(name, lines, cuts):
    data = bytearray(KINDS[name](lines))
    for _ in range(cuts.draw(st.integers(1, 3))):
        place = cuts.draw(st.integers(0, len(data)))
        data[place : place + cuts.draw(st.integers(0, 8))] = cuts.draw(st.binary(max_size=8))
    read_or_refuse(name, bytes(data))


@settings(max_examples=40)
@given(lines=LINES)
def test_every_format_makes_the_same_rows(lines):
    read = {name: rows_of(name, write(lines)) for name, write in KINDS.items()}
    outcomes = {
        name: [
            (row.id, row.request.body()["input"], row.cells["sku"])
            if isinstance(row, Row)
            else (row.id, "refused")
            for row in rows
        ]
        for name, rows in read.items()
    }
    assert len(outcomes["m.csv"]) == len(lines)
    assert all(rows == outcomes["m.csv"] for rows in outcomes.values())
