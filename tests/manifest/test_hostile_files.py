"""A small hostile manifest is refused in little memory and time, above a plan of one row.

`python -m tests.manifest.test_hostile_files` prints the table.
"""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")
from tests.manifest import lying_parquet as lying  # noqa: E402 - needs zstandard

MAX_FILE_BYTES = 1_000_000
MAX_MEMORY_MB = 200
MAX_CPU_SECONDS = 5

PROGRAM = """
import sys, time
import pyarrow.parquet, zstandard
from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow

def read(url):
    said = "accepted"
    try:
        for row in Manifest(url).rows():
            if isinstance(row, RefusedRow):
                said = row.reason
    except ManifestError as error:
        return error.message
    return said

def used():
    # The peak of `getrusage` includes that of the parent process.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1_000, time.process_time()

one, hostile = sys.argv[1:]
assert read(one) == "accepted"
before = used()
said = read(hostile)
after = used()
print(f"{after[0] - before[0]:.0f} {after[1] - before[1]:.2f} {said[:150]}")
"""
HEADER = b"id,prompt\n"
BIG = "x" * 2_000_000


def repeated(head, piece, number):
    """Compress many equal pieces with gzip, whatever their size."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        packed.write(head)
        block = piece * min(100_000, 10**8 // len(piece))
        for _ in range(number * len(piece) // len(block)):
            packed.write(block)
    return file.getvalue()


def parquet(columns, **options):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd", **options)
    return file.getvalue()


def long_dictionary(rows, kind, length=2_000_000):
    text = BIG[:length]
    texts = pa.array([text if kind != pa.binary() else text.encode()], kind)
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), texts)


def zstd(data):
    return zstandard.ZstdCompressor(level=19).compress(data)


FILES = {
    "a row that never ends (csv.gz)": lambda: repeated(HEADER + b'a,"', b'\n",a,"', 40_000_000),
    "an unclosed quote (csv.gz)": lambda: repeated(HEADER + b'a,"', b"x\n", 50_000_000),
    "a line of commas (csv.gz)": lambda: repeated(HEADER, b",", 100_000_000),
    "blank lines (csv.gz)": lambda: repeated(HEADER, b"\n", 50_000_000),
    "blank lines (jsonl.gz)": lambda: repeated(b'{"prompt": "x"}\n', b"\n", 50_000_000),
    "equal rows (csv.zst)": lambda: zstd(HEADER + (b"," + b"x" * 100_000 + b"\n") * 3_000),
    "equal rows (csv.xz)": lambda: lzma.compress(
        HEADER + (b"," + b"x" * 100_000 + b"\n") * 3_000, preset=1
    ),
    "equal rows (csv.bz2)": lambda: bz2.compress(HEADER + (b"," + b"x" * 100_000 + b"\n") * 3_000),
    "140,000 columns (csv)": lambda: ",".join(f"c{n:x}" for n in range(140_000)).encode(),
    "80,000 names in a line (jsonl)": lambda: json.dumps(
        {f"c{n:x}": 0 for n in range(80_000)}
    ).encode(),
    "140,000 times the same name (jsonl)": lambda: b'{%s"x":1}' % (b'"x":1,' * 140_000),
    "other names in each line (jsonl)": lambda: b"".join(
        json.dumps({f"{line}-{n}": 0 for n in range(1_900)}).encode() + b"\n" for line in range(30)
    ),
    "lists in lists (jsonl)": lambda: b'{"prompt":' + b"[" * 400_000,
    "a list of 240,000 numbers (jsonl)": lambda: b'{"images":[' + b"1," * 240_000 + b"1]}",
    "a struct of long texts (parquet)": lambda: parquet(
        {"prompt": ["x"] * 1_000, "s": pa.array([{"a": BIG}] * 1_000)}
    ),
    "lists of long texts (parquet)": lambda: parquet(
        {"prompt": ["x"] * 1_000, "images": pa.array([[BIG]] * 1_000)}
    ),
    "maps of long texts (parquet)": lambda: parquet(
        {
            "prompt": ["x"] * 1_000,
            "m": pa.array([[("a", BIG)]] * 1_000, pa.map_(pa.string(), pa.string())),
        }
    ),
    "twenty million values in a row (parquet)": lambda: parquet(
        {"prompt": ["x"], "images": pa.array([["x"] * 20_000_000])}
    ),
    "four million values in a row (parquet)": lambda: parquet(
        {"prompt": ["x"], "images": pa.array([["x"] * 4_000_000])}
    ),
    "long bytes (parquet)": lambda: parquet(
        {"prompt": ["x"] * 1_000, "b": long_dictionary(1_000, pa.binary())}
    ),
    "long values of fixed size (parquet)": lambda: parquet(
        {
            "prompt": ["x"] * 1_000,
            "b": pa.array([BIG.encode()] * 50 + [None] * 950, pa.binary(2_000_000)),
        }
    ),
    "twenty million null rows (parquet)": lambda: parquet(
        {"prompt": pa.nulls(20_000_000, pa.string())}
    ),
    "long texts without a dictionary (parquet)": lambda: parquet(
        {"prompt": [BIG] * 300}, use_dictionary=False, write_statistics=False
    ),
    "2,500 columns (parquet)": lambda: parquet({f"c{n}": [n] for n in range(2_500)}),
    "a footer that hides a long dictionary (parquet)": lambda: lying.parquet_file(
        lying.long_dictionary(300_000_000), 1_000
    ),
    "a footer that hides a long text (parquet)": lambda: lying.parquet_file(
        lying.long_texts(300_000_000), 1
    ),
    "a footer that hides many texts (parquet)": lambda: lying.parquet_file(
        lying.long_texts(500_000, 600), 600
    ),
    "a page that says 2 GB (parquet)": lambda: lying.parquet_file(
        [lying.page(lying.defined(1) + lying.text(1), 1, size=2**31 - 1)], 1
    ),
    "row groups with the same pages (parquet)": lambda: lying.parquet_file(
        lying.long_dictionary(10_000_000, 1), 1, groups=4_000
    ),
    "texts that repeat each other (parquet)": lambda: lying.parquet_file(
        lying.distinct_texts(500_000, 1_000), 1_000
    ),
    "long texts that repeat each other (parquet)": lambda: lying.parquet_file(
        lying.distinct_texts(20_000_000, 200), 200
    ),
    "240,000 empty chunks (parquet)": lambda: lying.parquet_file(
        lying.long_texts(1), 1, chunks=240_000
    ),
    "100 times 2,400 empty chunks (parquet)": lambda: lying.parquet_file(
        lying.long_texts(1), 1, chunks=2_400, groups=100
    ),
    "groups in groups (parquet)": lambda: lying.parquet_file(lying.long_texts(1), 1, deep=60_000),
    "more rows than there are (parquet)": lambda: lying.parquet_file(
        lying.long_texts(1), 1, more_rows=2**40
    ),
    "a text for all rows of many columns (parquet)": lambda: parquet(
        dict.fromkeys(map(str, range(150)), long_dictionary(5_000, pa.string(), 130_000))
        | {"prompt": ["x"] * 5_000}
    ),
    "long lists in many columns (parquet)": lambda: parquet(
        dict.fromkeys(
            map(str, range(300)),
            pa.ListArray.from_arrays([0, 300], long_dictionary(300, pa.string(), 100_000)),
        )
        | {"prompt": ["x"]}
    ),
    "a number without an end (parquet)": lambda: (
        b"PAR1\x15%b%bPAR1"
        % (
            b"\xff" * 900_000,
            (900_001).to_bytes(4, "little"),
        )
    ),
    "1,000 columns of a million nulls (parquet)": lambda: parquet(
        {"prompt": pa.array(["x"] * 100_000)}
        | {f"c{n}": pa.nulls(100_000, pa.string()) for n in range(1_000)},
        write_statistics=False,
    ),
    "450,000 equal rows (csv)": lambda: b"prompt\n" + b"x\n" * 450_000,
    "200,000 invalid rows (csv)": lambda: b"prompt,mode\n" + b"x,y\n" * 200_000,
    "200,000 empty objects (json)": lambda: b"[" + b"{}," * 200_000 + b"{}]",
    "1,900 empty cells a row (csv.gz)": lambda: repeated(
        b"prompt," + b",".join(b"c%d" % n for n in range(1_900)) + b"\n",
        b"x" + b"," * 1_900 + b"\n",
        100_000,
    ),
    "990 names twice in a line (jsonl.gz)": lambda: repeated(
        b"", b"{%b}\n" % b",".join(b'"%d":0' % (n % 990) for n in range(1_980)), 9_000
    ),
    "lists of numbers (jsonl.gz)": lambda: repeated(
        b"", b'{"prompt":"x","n":[%b0]}\n' % (b"0," * 1_000), 100_000
    ),
    "NUL characters (csv)": lambda: HEADER + b"a,\0\n" * 200_000,
    "a field of NUL characters (csv)": lambda: HEADER + b"\0" * 900_000,
    "quotation marks (csv)": lambda: HEADER + b'"' * 900_000,
    "quotation marks in text (tsv)": lambda: b"id\tprompt\n" + b'"a\t"b\n' * 150_000,
}


def ending(name):
    return "m." + name.rpartition("(")[2].rstrip(")")


def measure(name, folder):
    """Return megabytes, seconds of CPU and the message for a hostile file, above one row."""
    one, hostile = Path(folder, "one.csv"), Path(folder, ending(name))
    one.write_bytes(HEADER + b"a,oil\n")
    data = FILES[name]()
    assert len(data) < MAX_FILE_BYTES, len(data)
    hostile.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(one), str(hostile)],
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    memory, seconds, said = done.stdout.rstrip("\n").split(" ", 2)
    return len(data), float(memory), float(seconds), said


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_is_refused_cheaply(name, tmp_path):
    _, memory, seconds, said = measure(name, tmp_path)
    assert said != "accepted"
    assert memory < MAX_MEMORY_MB, said
    assert seconds < MAX_CPU_SECONDS, said


if __name__ == "__main__":
    for each in sys.argv[1:] or FILES:
        with tempfile.TemporaryDirectory() as place:
            size, used, cpu, message = measure(each, place)
        sys.stdout.write(f"| {each} | {size:,} | {used:.0f} MB | {cpu:.1f} s | {message} |\n")
