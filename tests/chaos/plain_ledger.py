"""The ledger read as plain JSON files, by nothing of the package."""

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
        """A person said that it may be paid for again."""
        return self.posted is not None and self.posted["by"] == "person"

    @property
    def accepted(self):
        """The ledger takes it for accepted."""
        return bool(self.ended) or (self.posted is not None and self.posted["state"] == "accepted")

    @property
    def price(self):
        return Decimal(str(self.intent["price"]))

    @property
    def state(self):
        """Where its row stands, in the words of the result manifest."""
        if self.ended is not None:
            return self.ended["state"]
        if self.posted is None:
            return "unknown"
        return "outstanding" if self.accepted else "failed"


@dataclass
class PlainLedger:
    """The ledger's files, as anybody could read them."""

    attempts: dict[str, list[Attempt]]
    run_partitions: dict[str, dict]
    in_markers: set[str]
    without_intent: list[str]

    @classmethod
    def read(cls, files):
        records = defaultdict(dict)
        run_partitions, in_markers = {}, set()
        for name, data in files.items():
            folder, *rest = name.split("/")
            if folder == "rows":
                key, number, step, _ = rest[-1].split(".")
                records[key].setdefault(int(number), {})[step] = json.loads(data)
            elif folder == "waves" and name.endswith(".jsonl"):
                for line in map(json.loads, data.splitlines()):
                    if line["attempt"] >= run_partitions.get(line["key"], line)["attempt"]:
                        run_partitions[line["key"]] = line
            elif folder == "waves":
                in_markers.update(json.loads(data)["keys"])
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
        return cls(attempts, run_partitions, in_markers, without_intent)
