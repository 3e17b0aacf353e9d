"""Folders that Spark and the like write: the parts of a table are one manifest."""

import gzip

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from tests.support import pictures
from tests.support.plans import build_plan
from tests.support.s3 import s3_server


def csv_part(*numbers):
    return "".join(["id,prompt\n", *(f"r{n},cat {n}\n" for n in numbers)])


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def ids(manifest):
    return [row.id for row in manifest.rows()]


SPARK = {
    "part-00001-abc.csv": csv_part(3),
    "part-00000-abc.csv": csv_part(1, 2),
    "part-00002-abc.csv": "",
    "_SUCCESS": "",
    ".part-00000-abc.csv.crc": "crc",
    "._SUCCESS.crc": "crc",
}


@pytest.mark.parametrize("name", ["parts", "m.csv", "m.csv/", "m.csv/part-*.csv", "m.csv/*"])
def test_parts_are_read_in_order_and_other_files_counted(tmp_path, name):
    write(tmp_path / name.split("/")[0], SPARK)
    manifest = Manifest(f"{tmp_path}/{name}")
    assert [(row.id, row.line) for row in manifest.rows()] == [("r1", 2), ("r2", 3), ("r3", 5)]
    plan = build_plan(manifest)
    assert plan.skipped["empty files"] == 1
    assert plan.skipped["hidden files"] == 2
    assert plan.skipped["other files"] == (0 if name.endswith(".csv") and "*" in name else 1)
    assert not plan.skipped["non-image files"]


@pytest.mark.parametrize("kind", ["json", "csv.gz", "parquet"])
def test_parts_of_every_format_are_read(tmp_path, kind):
    for number in (0, 1):
        path = tmp_path / f"part-0000{number}.snappy.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"id": [f"r{number}"], "prompt": ["cat"]}), path)
        elif kind == "json":
            path.write_text(f'{{"id": "r{number}", "prompt": "cat"}}\n')
        else:
            path.write_bytes(gzip.compress(csv_part(number).encode()))
    assert ids(Manifest(str(tmp_path))) == ["r0", "r1"]


def test_folders_give_columns(tmp_path):
    """As `partitionBy("team", "style")` writes them."""
    write(
        tmp_path,
        {
            "team=blue/style=oil/part-0.csv": csv_part(1),
            "team=light%20red/style=noir/part-0.csv": csv_part(2),
            "_SUCCESS": "",
        },
    )
    rows = list(Manifest(str(tmp_path)).rows())
    assert [(row.id, row.cells["team"], row.style) for row in rows] == [
        ("r1", "blue", "oil"),
        ("r2", "light red", "noir"),
    ]


def test_bucket_with_parts_is_read():
    fs = fsspec.filesystem("memory")
    for name, content in SPARK.items():
        fs.pipe_file(f"/spark-parts/m.csv/{name}", content.encode())
    assert ids(Manifest("memory://spark-parts/m.csv")) == ["r1", "r2", "r3"]


def test_invalid_row_of_a_part_is_refused_alone(tmp_path):
    write(tmp_path, {"part-0.csv": csv_part(1), "part-1.csv": "id,prompt\nx\ny,cat\n"})
    refused = [row for row in Manifest(str(tmp_path)).rows() if isinstance(row, RefusedRow)]
    assert [(row.line, row.reason) for row in refused] == [
        (4, "the row has 1 of 2 cells; add the missing ones")
    ]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"_delta_log/00000.json": "{}"}, "is a Delta table"),
        ({".hoodie/hoodie.properties": "x"}, "is a Hudi table"),
        ({"_temporary/0/part-1.csv": csv_part(9)}, "a job that has not ended"),
    ],
)
def test_files_that_are_no_plain_table_are_refused(tmp_path, extra, expected):
    write(tmp_path, SPARK | extra)
    with pytest.raises(ManifestError, match=expected):
        build_plan(Manifest(str(tmp_path)))


def test_part_without_a_header_is_named(tmp_path):
    write(tmp_path, {"part-0.csv": csv_part(1), "part-1.csv": "r2,cat\n"})
    with pytest.raises(ManifestError, match=r"part-1\.csv has no column"):
        build_plan(Manifest(str(tmp_path)))


def test_folder_of_images_with_a_table_is_images(tmp_path):
    write(tmp_path, {"a/x.jpg": pictures.picture(), "labels.csv": csv_part(1), "a/x.json": "{}"})
    manifest = Manifest(str(tmp_path), "oil")
    assert ids(manifest) == ["a/x"]
    assert manifest.skipped["non-image files"] == 2


def test_rows_of_parts_have_the_rights_of_a_file(tmp_path):
    """A local table may name local files; a folder of images may only name its own."""
    write(tmp_path, {"images/x.jpg": pictures.picture()})
    row = f"id,image,prompt\na,{tmp_path}/images/x.jpg,oil\n"
    write(tmp_path / "parts", {"part-0.csv": row})
    (made,) = Manifest(f"{tmp_path}/parts").rows()
    assert isinstance(made, Row)


@pytest.mark.parametrize("place", ["m.csv", "m.csv/", "m.csv/part-*"])
def test_parts_on_s3_are_read_beside_markers(place):
    """Consoles and Hadoop mark folders by empty objects."""
    with s3_server() as (bucket, client):
        for name, content in {"": "", **SPARK, "_started_1": "x"}.items():
            client.put_object(Bucket="pictures", Key=f"run/m.csv/{name}", Body=content.encode())
        assert ids(Manifest(f"{bucket}/run/{place}")) == ["r1", "r2", "r3"]
