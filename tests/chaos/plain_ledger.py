"""The ledger read as plain JSON files, without code of the package."""

import json
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal


@dataclass
class Attempt:
    intent: dict
    posted: dict | None = None
    ended: dict | None = None

    @property
    def given_up(self):
        """Whether a user gave the attempt up, so that the row may be paid for again."""
        return self.posted is not None and self.posted["by"] == "person"

    @property
    def accepted(self):
        """Whether the ledger counts it as accepted."""
        return bool(self.ended) or (self.posted is not None and self.posted["state"] == "accepted")

    @property
    def price(self):
        return Decimal(str(self.intent["price"]))

    @property
    def state(self):
        """The state of its row, as the result manifest calls it."""
        if self.ended is not None:
            return self.ended["state"]
        if self.posted is None:
            return "unknown"
        return "outstanding" if self.accepted else "failed"


@dataclass
class PlainLedger:
    """The records of a ledger, by row key."""

    attempts: dict[str, list[Attempt]]
    in_wave_files: dict[str, dict]
    in_open_waves: set[str]
    without_intent: list[str]

    @classmethod
    def read(cls, files):
        records = defaultdict(dict)
        in_wave_files, in_open_waves = {}, set()
        for name, data in files.items():
            folder, *rest = name.split("/")
            if folder == "rows":
                key, number, step, _ = rest[-1].split(".")
                records[key].setdefault(int(number), {})[step] = json.loads(data)
            elif folder == "waves" and name.endswith(".jsonl"):
                for line in map(json.loads, data.splitlines()):
                    if line["attempt"] >= in_wave_files.get(line["key"], line)["attempt"]:
                        in_wave_files[line["key"]] = line
            elif folder == "waves":
                in_open_waves.update(json.loads(data)["keys"])
        attempts = {
            key: [Attempt(**by_number[n]) for n in sorted(by_number) if "intent" in by_number[n]]
            for key, by_number in records.items()
        }
        attempts = {key: known for key, known in attempts.items() if known}
        without_intent = [
            f"{key}.{n}"
            for key in records
            for n in records[key]
            if "intent" not in records[key][n]
        ]
        return cls(attempts, in_wave_files, in_open_waves, without_intent)
