"""Copy the images of an output elsewhere: as files, or as a data set of shards.

Rows are streamed: memory holds a few images, a temporary file one shard.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.images.decode import EXTENSIONS
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.images.headers import extract_image, read_format, read_size
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.references.identity import read_content
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.references.rights import find_retry_rights, find_rights_problem
from prefect_flux_kontext.report.results import RESULTS_JSONL, Line, encode_line, read_lines
from prefect_flux_kontext.report.thumbnails import download_reference
from prefect_flux_kontext.report.verdicts import Verdicts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from prefect_flux_kontext.client.transport import Connections
    from prefect_flux_kontext.storage.filesystem import OutputFolder

ExportFormat = Literal["files", "webdataset", "parquet"]

# Rows whose images are read at a time.
_PARALLEL_ROWS = 8

_SHARD = re.compile(r"shard-(\d{6})\.(tar|parquet)")

_DOWNLOAD_TIMEOUT_SECONDS = 30.0

_ROW_GROUP_BYTES = 8 * 2**20

_TEXT_COLUMNS = ("id", "style", "prompt", "mode", "aspect_ratio", "output_format", "provider")
_COLUMNS = (*_TEXT_COLUMNS, "verdict", "check_flags", "key")


class Sample(NamedTuple):
    """A row with the bytes of its images."""

    line: Line  # of the result manifest, with its verdict
    after: bytes
    before: bytes | None  # None if it has no reference, or it cannot be read


async def export_output(
    output: OutputFolder,
    target: OutputFolder,
    kind: ExportFormat,
    *,
    only_kept: bool,
    shard_bytes: int,
    base_url: str,
) -> Counter[str]:
    """Copy the stored images of an output, replacing those of an earlier export.

    The kind `files` copies images and their lines; the others write shards, each with about
    `shard_bytes` of images. The service's `base_url` says whether references may be at private
    addresses.

    Returns counts of `rows` and `shards`, of rows `without_before` although they have a reference,
    and of `missing` images.

    Raises:
        ConfigurationError: The output has no results, or the target is the output.
        StorageError: The output cannot be read, or the target cannot be written to.
    """
    if str(target) == str(output):
        raise ConfigurationError("The target of an export must not be the output itself.")
    counts: Counter[str] = Counter(rows=0, shards=0, without_before=0, missing=0)
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder:
        results = Path(folder, "results")
        if not await output.fetch(RESULTS_JSONL, results):
            raise ConfigurationError(
                f"There are no results at {output}. Update them: flux-kontext gallery {output}"
            )
        verdicts = {
            key: str(found.verdict) for key, found in (await Verdicts(output).load()).items()
        }
        lines = (
            {**line, "verdict": verdicts.get(line["key"])}
            for line in read_lines(results)
            if line["state"] == "stored"
        )
        wanted = (line for line in lines if not only_kept or line["verdict"] == "keep")
        async with open_download_client(base_url=base_url) as http:
            samples = _read_samples(output, wanted, http, counts, with_before=kind != "files")
            if kind == "files":
                await _write_files(samples, target, Path(folder, "lines"))
            else:
                await _write_shards(samples, target, kind, shard_bytes, Path(folder), counts)
    return counts


async def _read_samples(
    output: OutputFolder,
    lines: Iterator[Line],
    http: Connections,
    counts: Counter[str],
    *,
    with_before: bool,
) -> AsyncIterator[Sample]:
    ledger = Ledger(open_ledger_store(output), owner="", prices={})

    async def read(line: Line) -> Sample | None:
        after = None if "://" in line["file"] else await output.read(line["file"])
        if after is None:
            return None
        return Sample(line, after, await _read_before(line, ledger, http) if with_before else None)

    while block := [line for _, line in zip(range(_PARALLEL_ROWS), lines, strict=False)]:
        for sample in await asyncio.gather(*map(read, block)):
            if sample is None:
                counts["missing"] += 1
                continue
            counts["rows"] += 1
            has_reference = with_before and bool(sample.line.get("reference_images"))
            counts["without_before"] += has_reference and sample.before is None
            yield sample


async def _read_before(line: Line, ledger: Ledger, http: Connections) -> bytes | None:
    """Return a row's reference; None if it has none, may not be read, or is no image."""
    url = next(iter(line.get("reference_images") or ()), None)
    if url is None:
        return None
    try:
        if not non_public_references([url]):
            async with asyncio.timeout(_DOWNLOAD_TIMEOUT_SECONDS):
                data = bytes(await download_reference(http, url))
        else:
            # The result manifest may be changed by others; the ledger says what the row had.
            intent = (await ledger.read(line["key"])).intent
            known = intent.request.image_urls if intent else []
            if find_rights_problem(url, find_retry_rights(str(ledger.store), known)):
                return None
            data = await asyncio.to_thread(read_content, url, fit=False)
    except Exception:  # noqa: BLE001 - each filesystem and client has errors of its own
        return None
    return data if read_size(data) and extract_image(data) else None


async def _write_files(samples: AsyncIterator[Sample], target: OutputFolder, lines: Path) -> None:
    with lines.open("w", encoding="ascii") as file:
        async for sample in samples:
            await target.write(sample.line["file"], sample.after)
            known = {name: value for name, value in sample.line.items() if value is not None}
            file.write(encode_line(known))
    await target.put(RESULTS_JSONL, lines)


async def _write_shards(
    samples: AsyncIterator[Sample],
    target: OutputFolder,
    kind: ExportFormat,
    shard_bytes: int,
    folder: Path,
    counts: Counter[str],
) -> None:
    writer: _TarShard | _ParquetShard | None = None
    file = folder / "shard"
    ending = "tar" if kind == "webdataset" else "parquet"

    async def close() -> None:
        nonlocal writer
        if writer is not None:
            await asyncio.to_thread(writer.close)
            await target.put(f"shard-{counts['shards']:06}.{ending}", file)
            counts["shards"] += 1
            writer = None

    async for sample in samples:
        if writer is None:
            writer = _TarShard(file) if kind == "webdataset" else _ParquetShard(file)
        await asyncio.to_thread(writer.add, sample, counts["rows"])
        if writer.size >= shard_bytes:
            await close()
    await close()
    for name in await target.list_stamps(""):
        shard = _SHARD.fullmatch(name)
        if shard and shard[2] == ending and int(shard[1]) >= counts["shards"]:
            await target.remove(name)  # of a larger export before


class _TarShard:
    """A shard in the WebDataset format: files of one sample share their name up to a dot."""

    def __init__(self, file: Path) -> None:
        self.size = 0
        self._tar = tarfile.open(file, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, sample: Sample, number: int) -> None:
        line, name = sample.line, f"{number:09}"
        self._add(f"{name}.after.{_extension(sample.after)}", sample.after)
        if sample.before is not None:
            self._add(f"{name}.before.{_extension(sample.before)}", sample.before)
        described = {column: line.get(column) for column in _COLUMNS}
        described["variant_number"] = line.get("variant_number") or 1
        self._add(f"{name}.json", json.dumps(described).encode())

    def close(self) -> None:
        self._tar.close()

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        self.size += len(data)


class _ParquetShard:
    """A shard whose image columns the `datasets` library loads as images."""

    def __init__(self, file: Path) -> None:
        try:
            import pyarrow as pa  # noqa: PLC0415
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError:
            raise ConfigurationError(
                'Parquet needs pyarrow: pip install "prefect-flux-kontext[parquet]".'
            ) from None
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        fields = [("before", image), ("after", image), ("variant_number", pa.int64())]
        fields += [(name, pa.string()) for name in _COLUMNS]
        features: dict[str, Any] = {
            name: {"_type": "Image"}
            if kind == image
            else {"_type": "Value", "dtype": "int64" if kind == pa.int64() else "string"}
            for name, kind in fields
        }
        described = json.dumps({"info": {"features": features}})
        self.size = self._buffered = 0
        self._rows: list[dict[str, Any]] = []
        self._pa = pa
        self._schema = pa.schema(fields, metadata={"huggingface": described})
        # Images are compressed already, and a dictionary of them would only take memory.
        self._writer = pq.ParquetWriter(
            file,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            memory_pool=pa.system_memory_pool(),
        )

    def add(self, sample: Sample, number: int) -> None:
        line = sample.line
        row: dict[str, Any] = {column: line.get(column) for column in _COLUMNS}
        row["check_flags"] = ", ".join(line.get("check_flags") or ()) or None
        row["variant_number"] = line.get("variant_number") or 1
        for name, data in (("before", sample.before), ("after", sample.after)):
            if data is not None:
                path = f"{number:09}.{name}.{_extension(data)}"
                row[name] = {"bytes": data, "path": path}
                self.size += len(data)
                self._buffered += len(data)
        self._rows.append(row)
        if self._buffered >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._buffered = [], 0


def _extension(data: bytes) -> str:
    return EXTENSIONS[read_format(data)]
