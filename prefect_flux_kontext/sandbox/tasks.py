"""Tasks: their latency, state and wire form."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from prefect_flux_kontext.sandbox.contract import GenerationInput, JsonObject, Submission


class LatencyModel:
    """A lognormal distribution, with the long tail of generation services, in seconds."""

    def __init__(self, mean: float, spread: float) -> None:
        variance = math.log1p(spread**2)
        self._sigma = math.sqrt(variance)
        self._mu = math.log(mean) - variance / 2 if mean else -math.inf

    def draw(self, rng: random.Random) -> float:
        """Draw the seconds of one task."""
        return rng.lognormvariate(self._mu, self._sigma)


State = Literal["pending", "processing", "success", "failed"]

_PENDING_SHARE = 0.1
_NSFW = re.compile(r"\bnsfw\b", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class Task:
    """An accepted, and so billed, task. Times are of the loop, in seconds.

    `ready_at` is when the latency is over, `references_at` when the references were checked.
    """

    task_id: str
    key: str
    submission: Submission
    base_url: str
    price: int  # micro-dollars
    accepted_at: float
    ready_at: float
    is_failing: bool
    references_at: float | None
    reference_error: str | None = None

    @property
    def input(self) -> GenerationInput:
        """The `input` of the submit body."""
        return self.submission.input

    @property
    def result_path(self) -> str:
        """The path of the result image."""
        kind = "jpg" if self.input.output_format == "jpeg" else "png"
        return f"/results/{self.task_id}/1.{kind}"

    def ended_at(self, now: float) -> float | None:
        """Return the loop time at which it ended, or None while it runs."""
        if now < self.ready_at or self.references_at is None:
            return None
        return max(self.ready_at, self.references_at)

    def state(self, now: float) -> State:
        """Return the state at a loop time."""
        if self.ended_at(now) is not None:
            return "failed" if self.failure() else "success"
        pending = _PENDING_SHARE * (self.ready_at - self.accepted_at)
        return "pending" if now - self.accepted_at < pending else "processing"

    def failure(self) -> tuple[str, str] | None:
        """Return fail code and message of a task that fails, or None."""
        if _NSFW.search(self.input.prompt):
            return "CONTENT_VIOLATION", "The prompt breaks the content rules."
        if self.reference_error:
            return "INVALID_IMAGE_URL", self.reference_error
        if self.is_failing:
            return "GENERATION_FAILED", "The picture could not be generated."
        return None

    def status(self, now: float, epoch: float) -> JsonObject:
        """Return the `data` of a status envelope; `epoch` added to loop time is Unix time."""
        created = _milliseconds(self.accepted_at + epoch)
        data: JsonObject = {
            "taskId": self.task_id,
            "state": self.state(now),
            "createTime": created,
        }
        ended_at = self.ended_at(now)
        if ended_at is None:
            return data
        # From the duration alone, so that rounding of the start does not change a repeated run.
        data["costTime"] = _milliseconds(ended_at - self.accepted_at)
        data["completeTime"] = created + data["costTime"]
        if failure := self.failure():
            data["failCode"], data["failMsg"] = failure
        else:
            data["resultJson"] = json.dumps({"resultUrls": [self.base_url + self.result_path]})
        return data

    def record(self, now: float, epoch: float) -> JsonObject:
        """Return the task's entry of `GET /sandbox/tasks`."""
        ended_at = self.ended_at(now)
        return {
            "taskId": self.task_id,
            "prompt": self.input.prompt,
            "image_urls": self.input.image_urls,
            "mode": self.input.mode,
            "aspect_ratio": self.input.aspect_ratio,
            "output_format": self.input.output_format,
            "provider": self.submission.provider,
            "callback_url": self.submission.callback_url,
            "accepted_at": _milliseconds(self.accepted_at + epoch),
            "ended_at": None if ended_at is None else _milliseconds(ended_at + epoch),
            "state": self.state(now),
            "price": dollars(self.price),
        }


def fingerprint(payload: Mapping[str, JsonObject]) -> bytes:
    """Hash a valid submit body, so that a run repeats.

    The hash excludes what differs between two rehearsals of the same batch: the callback URL
    with its token, and the host and port of the references.
    """
    wanted = payload["input"]
    paths = [_path(url) for url in wanted.get("image_urls", [])]
    identity = {**payload, "callback_url": None, "input": {**wanted, "image_urls": paths}}
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).digest()


def dollars(micro_dollars: int) -> str:
    """Format micro-dollars as an exact decimal number of dollars."""
    return f"{micro_dollars // 1_000_000}.{micro_dollars % 1_000_000:06d}"


def _path(url: str) -> str:
    try:
        return urlsplit(url)._replace(scheme="", netloc="").geturl()
    except ValueError:
        return url


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1_000)
