"""The rows of an output while a batch runs, anywhere: read from its results and its ledger.

It only reads, so it works without write rights and costs the batch nothing.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.batch.result_rows import line_from_records
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.ledger.waves import FinishedRow, read_open_waves
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.report.gallery.page import GalleryRows
from prefect_flux_kontext.report.gallery.thumbnails import GALLERY_FOLDER, ThumbnailStore
from prefect_flux_kontext.report.results import (
    RESULTS_JSONL,
    Line,
    line_identity,
    merge_lines,
    open_results_store,
    read_lines,
    read_run_plan,
)
from prefect_flux_kontext.report.statistics import Statistics
from prefect_flux_kontext.report.thumbnails import image_thumbnail_name
from prefect_flux_kontext.report.verdicts import Verdict, Verdicts

if TYPE_CHECKING:
    from prefect_flux_kontext.storage.filesystem import OutputFolder

# A row in progress takes up to four small reads; the others wait for the next refresh.
_ROWS_PER_REFRESH = 512

_RATE_SECONDS = 60.0


class WatchedOutput:
    """The rows of an output, in the order in which they were first seen.

    It holds at most `max_rows`, and counts further ones. Each refresh has a number, `version`.
    The verdicts are by row key.
    """

    def __init__(self, output: OutputFolder, max_rows: int) -> None:
        self.rows: list[Line] = []
        self.version = 0
        self.thumbnails = ThumbnailStore(output)
        self.verdicts: dict[str, Verdict] = {}
        self._output = output
        self._max_rows = max_rows
        self._verdict_store = Verdicts(output)
        self._results = open_results_store(output)
        self._ledger = Ledger(open_ledger_store(output), owner="", prices={})
        self._index: dict[str, int] = {}
        self._changed_in: list[int] = []
        self._left_out: set[str] = set()
        self._files_read: set[str] = set()
        self._results_stamp: str | None = None
        self._stored: set[str] = set()
        self._pending: dict[str, None] = {}
        self._thumbnails_in = 0
        self._progress: dict[str, Any] = {}
        self._statistics: dict[str, Any] = {}

    async def refresh(self) -> None:
        """Read what is new.

        Raises:
            LedgerError: A record cannot be read or is damaged.
            StorageError: The output cannot be read.
        """
        self.version += 1
        # Parts first: a part that is merged meanwhile is then read twice rather than never.
        for name in await self._results.list_names("parts"):
            if name not in self._files_read:
                data = await self._results.read(f"parts/{name}") or b""
                self._add(map(json.loads, data.splitlines()))
                self._files_read.add(name)
        stamp = await self._output.read_stamp(RESULTS_JSONL)
        if stamp != self._results_stamp:
            with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder:
                await self._output.fetch(RESULTS_JSONL, Path(folder, "results"))
                await asyncio.to_thread(lambda: self._add(read_lines(Path(folder, "results"))))
            self._results_stamp = stamp
        await self._read_ledger()
        if await self.thumbnails.load_index(save=False):
            self._thumbnails_in = self.version
        plan = await read_run_plan(self._results)
        is_running = bool(plan) and await is_alive(self._ledger.store, plan["run"])
        await asyncio.to_thread(self._summarize, plan, is_running=is_running)

    async def load_verdicts(self) -> None:
        """Read the verdicts that changed, of any writer; with the errors of `refresh`."""
        before, self.verdicts = self.verdicts, await self._verdict_store.load()
        for key in {key for key, _ in before.items() ^ self.verdicts.items()}:
            self._mark_judged(key)

    async def judge(self, names: Iterable[str], asked: dict[str, Any]) -> None:
        """Record a verdict on the images whose thumbnails have these names, where known.

        The verdict `best` keeps an image and rejects the other variants of its row.

        Raises:
            LedgerError: The output cannot be written to.
            ValidationError: A field is invalid.
        """
        wanted = set(names)
        chosen = [
            line
            for line in self.rows
            if line["state"] == "stored" and image_thumbnail_name(line["key"]) in wanted
        ]
        keys = {line["key"] for line in chosen}
        families: dict[tuple[Any, ...], list[Line]] = {_family(line): [] for line in chosen}
        for line in self.rows:
            if (name := _family(line)) in families and line["state"] == "stored":
                families[name].append(line)
        best = asked["verdict"] == "best"
        made = []
        for line in chosen:
            fields = {**asked, "key": line["key"], "verdict": "keep" if best else asked["verdict"]}
            family = families[_family(line)]
            if asked["verdict"] == "redo" and not (asked.get("prompt") or asked.get("style")):
                fields["variant"] = 1 + max(row.get("variant_number", 1) for row in family)
            made.append(Verdict(**fields))
            made += [
                Verdict(key=row["key"], verdict="reject")
                for row in family
                if best and row["key"] not in keys
            ]
        await self._verdict_store.record(made)
        for verdict in made:
            self.verdicts.pop(verdict.key, None)
            if verdict.verdict is not None:
                self.verdicts[verdict.key] = verdict
            self._mark_judged(verdict.key)

    def find_file(self, name: str) -> str | None:
        """Return the file of an image, given the name of its thumbnail; None if unknown."""
        for line in self.rows:
            if line["state"] == "stored" and image_thumbnail_name(line["key"]) == name:
                return line.get("file")
        return None

    def has_file(self, file: str) -> bool:
        """Whether a stored row names the file, or it is one of thumbnails."""
        folder, _, name = file.rpartition("/")
        if folder == GALLERY_FOLDER:
            return name.removesuffix(".js") in self.thumbnails.files.values()
        return any(file == line.get("file") for line in self.rows)

    def gallery_rows(self) -> GalleryRows:
        """Return all rows as the page takes them."""
        return self._select(range(len(self.rows)))

    def changes(self, version: int) -> dict[str, Any]:
        """Return what changed after a refresh, ready for JSON."""
        at = [row for row, changed in enumerate(self._changed_in) if changed > version]
        files = self.thumbnails.files if self._thumbnails_in > version else None
        return {
            "version": self.version,
            "at": at,
            "rows": self._select(at).to_values(),
            "thumbnailFiles": files,
            **self.numbers(),
        }

    def numbers(self) -> dict[str, Any]:
        """Return statistics and progress as the page takes them."""
        return {"statistics": self._statistics, "progress": self._progress}

    def _select(self, at: list[int] | range) -> GalleryRows:
        rows = GalleryRows()
        for row in at:
            line = self.rows[row]
            judged = self.verdicts.get(line.get("key", ""))
            rows.add({**line, "verdict": judged.verdict if judged else None})
        return rows

    def _add(self, lines: Any) -> None:
        for line in lines:
            name = line_identity(line)
            at = self._index.get(name)
            if at is None and len(self.rows) >= self._max_rows:
                self._left_out.add(name)
            elif at is None:
                self._index[name] = len(self.rows)
                self.rows.append(line)
                self._changed_in.append(self.version)
            elif (merged := merge_lines(self.rows[at], line)) != self.rows[at]:
                self.rows[at] = merged
                self._changed_in[at] = self.version
            if line["state"] == "stored":
                self._stored.add(line.get("key", ""))

    async def _read_ledger(self) -> None:
        """Read the rows in progress, and those that ended without being in the results yet."""
        store = self._ledger.store
        waves = await store.list_names("waves")
        for name in waves:
            # A wave and its part of the results have the same name.
            if name.endswith(".jsonl") and name not in self._files_read:
                for text in (await store.read(f"waves/{name}") or b"").splitlines():
                    self._pending[FinishedRow.model_validate_json(text).key] = None
                self._files_read.add(name)
        async for wave in read_open_waves(store):
            self._pending |= dict.fromkeys(wave.keys)
        keys = [key for key in self._pending if key not in self._stored][:_ROWS_PER_REFRESH]
        read = set(keys)
        entries = await asyncio.gather(*map(self._ledger.read, keys))
        lines = [line_from_records(self._output, entry) for entry in entries]
        self._add(line for line in lines if line is not None)
        # The open wave of a row in progress adds it again, at the end.
        self._pending = dict.fromkeys(
            key for key in self._pending if key not in self._stored and key not in read
        )

    def _summarize(self, plan: dict[str, Any], *, is_running: bool) -> None:
        statistics = Statistics()
        run, now = plan.get("run"), utc_now()
        done = recent = 0
        for line in statistics.count(self.rows):
            done += line["run"] == run and line["state"] != "outstanding"
            if not line.get("stored_before") and (ended := line.get("finished_at")):
                age = (now - datetime.fromisoformat(ended)).total_seconds()
                recent += line["state"] == "stored" and age < _RATE_SECONDS
        self._statistics = statistics.summarize()
        seconds = _RATE_SECONDS
        if run:
            began = datetime.fromisoformat(plan["at"])
            seconds = min(seconds, max(1.0, (now - began).total_seconds()))
        rate = recent / seconds
        self._progress = {
            "running": is_running,
            "rows": plan.get("rows"),
            "done": done,
            "rate": rate,
            "secondsLeft": max(0, plan["rows"] - done) / rate if run and rate else None,
            "leftOut": len(self._left_out),
        }

    def _mark_judged(self, key: str) -> None:
        for at, line in enumerate(self.rows):
            if line.get("key") == key:
                self._changed_in[at] = self.version + 1


def _family(line: Line) -> tuple[Any, ...]:
    """Return what a row has in common with its other variants."""
    return line["id"], line.get("style")
