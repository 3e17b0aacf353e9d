"""Rows in no file reach partitions through the output, exactly as the batch has them."""

import datetime as dt
import decimal
import math
import stat

import polars as pl
import pytest

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.orchestration.partitions.files import read_shared_rows, share_rows
from prefect_flux_kontext.storage.filesystem import OutputFolder

pytestmark = pytest.mark.anyio

AWKWARD = [
    {"id": 1, "prompt": "a cat", "price": decimal.Decimal("1.50"), "on": dt.date.max},
    {"id": 2, "prompt": math.nan, "image": "https://cdn.example.com/a.jpg"},
    {"id": 3, "prompt": None, "tags": ["a", {"b": 1}]},
    {"ID": 4, "prompt": "a misnamed column"},
    {},
    {"id": 6, "prompt": b"bytes", "image": "https://cdn.example.com/a.jpg"},
    {"id": "a\ud800", "prompt": "half a character"},
    {"id": 7, "prompt": 'a cow, "quoted"\n', "image": "https://cdn.example.com/a.jpg?sig=x"},
]
SOURCES = {
    "list": AWKWARD,
    "tuple": tuple(AWKWARD),
    "polars": pl.DataFrame({"id": ["a", None, "b"], "prompt": ["x", None, "y"]}),
    "pandas": pl.DataFrame({"id": [1, 2], "prompt": ["x", "y"]}).to_pandas(),
}


def outline(rows):
    return [(row.id, row.line, getattr(row, "key", None)) for row in rows if hasattr(row, "key")]


@pytest.mark.parametrize("kind", SOURCES)
async def test_shared_rows_are_those_of_the_batch(kind, tmp_path):
    output = OutputFolder(str(tmp_path))
    manifest = Manifest(SOURCES[kind], styles=["oil", "noir"])
    async with share_rows(manifest, output) as parameters:
        rows = await read_shared_rows(output, parameters["rows_file"])
        shared = Manifest(rows, styles=["oil", "noir"])
        assert outline(shared.rows()) == outline(manifest.rows()) != []
        (file,) = tmp_path.glob("_partitions/*")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list(tmp_path.glob("_partitions/*"))


async def test_shared_rows_have_their_columns_renamed(tmp_path):
    output = OutputFolder(str(tmp_path))
    given = [{"sku": n, "text": f"cat {n}", "id": "own"} for n in range(3)]
    manifest = Manifest(given, columns={"id": "sku", "prompt": "text"})
    async with share_rows(manifest, output) as parameters:
        assert parameters["columns"] == {}
        shared = Manifest(await read_shared_rows(output, parameters["rows_file"]))
        assert outline(shared.rows()) == outline(manifest.rows())


async def test_manifest_that_partitions_can_open_is_not_shared(tmp_path):
    async with share_rows(Manifest("s3://bucket/m.csv"), OutputFolder(str(tmp_path))) as shared:
        assert shared == {}
    assert not list(tmp_path.iterdir())


async def test_signed_url_is_shared_and_not_a_parameter(tmp_path):
    url = "https://cdn.example.com/m.csv?X-Amz-Signature=feedbeef"
    output = OutputFolder(str(tmp_path))
    async with share_rows(Manifest(url), output) as parameters:
        assert "feedbeef" not in str(parameters)
        assert await read_shared_rows(output, parameters["rows_file"]) == url


@pytest.mark.parametrize("content", [None, b"", b'[{"id": "evil", "prompt": "x"}]'])
async def test_changed_or_missing_rows_are_refused(tmp_path, content):
    output = OutputFolder(str(tmp_path))
    async with share_rows(Manifest([{"id": "a", "prompt": "x"}]), output) as parameters:
        (file,) = tmp_path.glob("_partitions/*")
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(ManifestError, match="any more, or were changed"):
            await read_shared_rows(output, parameters["rows_file"])
