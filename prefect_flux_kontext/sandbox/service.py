"""The state of the sandbox: tasks, accounts with their limits, and the bill."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import math
import random
import re
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from prefect_flux_kontext.sandbox.contract import (
    GenerationInput,
    JsonObject,
    Refusal,
    Submission,
    read_submission,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from decimal import Decimal

    from prefect_flux_kontext.sandbox.settings import SandboxSettings

State = Literal["pending", "processing", "success", "failed"]

_PENDING_SHARE = 0.1
_NSFW = re.compile(r"\bnsfw\b", re.IGNORECASE)
_MINUTE = 60.0


class LatencyModel:
    """A lognormal distribution, with the long tail of generation services, in seconds."""

    def __init__(self, mean: float, spread: float) -> None:
        variance = math.log1p(spread**2)
        self._sigma = math.sqrt(variance)
        self._mu = math.log(mean) - variance / 2 if mean else -math.inf

    def draw(self, rng: random.Random) -> float:
        """Draw the seconds of one task."""
        return rng.lognormvariate(self._mu, self._sigma)


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
            "price": _dollars(self.price),
        }


class RequestWindow:
    """Counts requests in an exact sliding window of 60 s; `peak` is the most in one so far."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stamps: deque[float] = deque()
        self.peak = 0

    def wait(self, now: float) -> float:
        """Return the seconds until a request fits; 0 when it fits now."""
        while self._stamps and self._stamps[0] <= now - _MINUTE:
            self._stamps.popleft()
        if len(self._stamps) < self._limit:
            return 0.0
        # The same expression as above, so that rounding admits none.
        return self._stamps[0] - (now - _MINUTE)

    def count(self, now: float) -> None:
        """Count one request."""
        self._stamps.append(now)
        self.peak = max(self.peak, len(self._stamps))


class RunningTasks:
    """The tasks that hold a slot, without a timer for each; `peak` is the most so far."""

    def __init__(self) -> None:
        self._by_end: list[tuple[float, str, Task]] = []
        self._waiting_for_reference: set[Task] = set()
        self.peak = 0

    def count(self, now: float) -> int:
        """Return how many tasks run at a loop time."""
        while self._by_end and self._by_end[0][0] <= now:
            task = heapq.heappop(self._by_end)[2]
            if task.references_at is None:
                self._waiting_for_reference.add(task)
        return len(self._by_end) + len(self._waiting_for_reference)

    def add(self, task: Task) -> None:
        """Give a slot to a task that was just accepted."""
        heapq.heappush(self._by_end, (task.ready_at, task.task_id, task))
        self.peak = max(self.peak, self.count(task.accepted_at))

    def references_seen(self, task: Task) -> None:
        """Free the slot of a task that only waited for its references."""
        self._waiting_for_reference.discard(task)


class Account:
    """The state of one API key; the balance is in micro-dollars."""

    def __init__(self, balance: int, requests_per_minute: int) -> None:
        self.balance = balance
        self.window = RequestWindow(requests_per_minute)
        self.running = RunningTasks()


class Service:
    """Accounts, limits, tasks and the bill.

    State is computed from the clock of the event loop on request; nothing here waits. Methods
    that serve requests must be called on that loop. `bill` and `records` can be called from
    any thread.
    """

    def __init__(self, settings: SandboxSettings) -> None:
        self._settings = settings
        self._curve = LatencyModel(settings.mean, settings.spread)
        pro, pro_official = settings.price_pro, settings.price_pro_official
        top, top_official = settings.price_max, settings.price_max_official
        self._prices = {"pro": _micro_dollars(pro), "max": _micro_dollars(top)}
        self._official_prices = {
            "pro": _micro_dollars(pro if pro_official is None else pro_official),
            "max": _micro_dollars(top if top_official is None else top_official),
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self.epoch = 0.0
        self.reset()

    def reset(self) -> None:
        """Drop all accounts, tasks and counters."""
        self._accounts: dict[str, Account] = {}
        self._tasks: dict[str, Task] = {}
        self._same_requests: Counter[bytes] = Counter()
        self._counters: Counter[str] = Counter()

    def now(self) -> float:
        """Loop time in seconds; with `epoch`, Unix time. The first call must be on the loop."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self.epoch = time.time() - self._loop.time()
        return self._loop.time()

    def submit(self, key: str, payload: Any, base_url: str) -> Task:
        """Accept a task and charge for it, or raise a Refusal: 429, 400 or 402."""
        now = self.now()
        account = self._account(key)
        self._check_window(account, now, "submits_refused_requests")
        if account.running.count(now) >= self._settings.slots:
            self._counters["submits_refused_slots"] += 1
            raise Refusal(429, "too many tasks", f"{self._settings.slots} tasks are running")
        account.window.count(now)
        submission = read_submission(payload)
        is_official = submission.provider == "official"
        price = (self._official_prices if is_official else self._prices)[submission.input.mode]
        if account.balance < price:
            raise Refusal(402, "insufficient balance", f"{_dollars(account.balance)} dollars left")
        account.balance -= price
        task = self._new_task(key, submission, _fingerprint(payload), base_url, price, now)
        self._tasks[task.task_id] = task
        self._counters[f"accepted_{submission.input.mode}"] += 1
        self._counters["charged"] += price
        account.running.add(task)
        return task

    def status(self, key: str, task_id: str | None) -> Task:
        """Return the task if it belongs to the key, or raise a Refusal: 429, 400 or 404."""
        now = self.now()
        account = self._account(key)
        self._counters["status_requests"] += 1
        self._check_window(account, now, "statuses_refused")
        account.window.count(now)
        if not task_id:
            raise Refusal(400, "invalid parameters", "taskId: Field required")
        task = self._tasks.get(task_id)
        if task is None or task.key != key:
            raise Refusal(404, "task not found", f"no task {task_id[:64]!r}")
        return task

    def balance(self, key: str) -> int:
        """Return the balance of the key in micro-dollars."""
        return self._account(key).balance

    def result(self, task_id: str, path: str) -> Task:
        """Return the task of a result image, or raise a Refusal: 404, or 403 if it has expired."""
        task = self._tasks.get(task_id)
        now = self.now()
        if task is None or task.result_path != path or task.state(now) != "success":
            raise Refusal(404, "not found", "no such result")
        if now > (task.ended_at(now) or now) + self._settings.result_lifetime:
            raise Refusal(403, "forbidden", "this result has expired")
        return task

    def references_seen(self, task: Task, error: str | None) -> None:
        """Record that the references of a task were checked; `error` is the problem of one."""
        task.reference_error = error
        task.references_at = self.now()
        self._account(task.key).running.references_seen(task)

    def callback_ended(self, *, delivered: bool) -> None:
        """Count a callback as delivered, or as failed after the last try."""
        self._counters["callbacks_delivered" if delivered else "callbacks_failed"] += 1

    def bill(self) -> JsonObject:
        """Return charges and counters over all API keys; peaks are those of one key."""
        numbers, accounts = self._counters, list(self._accounts.values())
        return {
            "accepted": len(self._tasks),
            "dollars": _dollars(numbers["charged"]),
            "by_mode": {mode: numbers[f"accepted_{mode}"] for mode in self._prices},
            "submits_refused": {
                "requests": numbers["submits_refused_requests"],
                "slots": numbers["submits_refused_slots"],
            },
            "status_requests": numbers["status_requests"],
            "statuses_refused": numbers["statuses_refused"],
            "peak_running": max((account.running.peak for account in accounts), default=0),
            "peak_requests_a_minute": max(
                (account.window.peak for account in accounts), default=0
            ),
            "callbacks": {
                "delivered": numbers["callbacks_delivered"],
                "failed": numbers["callbacks_failed"],
            },
        }

    def records(self) -> Iterator[JsonObject]:
        """Yield the record of every accepted task in the order of acceptance."""
        for task in list(self._tasks.values()):
            yield task.record(self.now(), self.epoch)

    def _account(self, key: str) -> Account:
        account = self._accounts.get(key)
        if account is None:
            balance = _micro_dollars(self._settings.balance)
            account = self._accounts[key] = Account(balance, self._settings.requests_per_minute)
        return account

    def _check_window(self, account: Account, now: float, number: str) -> None:
        if wait := account.window.wait(now):
            self._counters[number] += 1
            limit = f"{self._settings.requests_per_minute} requests a minute"
            raise Refusal(429, "too many requests", limit, retry_after=max(1, math.ceil(wait)))

    def _new_task(
        self, key: str, submission: Submission, asked: bytes, base_url: str, price: int, now: float
    ) -> Task:
        # The seed depends on the request and on how often it was accepted before, not on the
        # time. So a run repeats even when concurrency reorders its submits.
        self._same_requests[asked] += 1
        turn = f"{self._settings.seed}/{self._same_requests[asked]}/".encode()
        digest = hashlib.blake2b(turn + asked, digest_size=16).hexdigest()
        rng = random.Random(digest[16:])
        is_failing = rng.random() < self._settings.fail_rate
        return Task(
            task_id=f"task_{digest[:16]}",
            key=key,
            submission=submission,
            base_url=base_url,
            price=price,
            accepted_at=now,
            ready_at=now + self._curve.draw(rng),
            is_failing=is_failing,
            references_at=None if submission.input.image_urls else now,
        )


def _fingerprint(payload: Mapping[str, JsonObject]) -> bytes:
    """Hash a valid submit body, so that a run repeats.

    The hash excludes what differs between two rehearsals of the same batch: the callback URL
    with its token, and the host and port of the references.
    """
    wanted = payload["input"]
    paths = [_path(url) for url in wanted.get("image_urls", [])]
    identity = {**payload, "callback_url": None, "input": {**wanted, "image_urls": paths}}
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).digest()


def _dollars(micro_dollars: int) -> str:
    """Format micro-dollars as an exact decimal number of dollars."""
    return f"{micro_dollars // 1_000_000}.{micro_dollars % 1_000_000:06d}"


def _path(url: str) -> str:
    try:
        return urlsplit(url)._replace(scheme="", netloc="").geturl()
    except ValueError:
        return url


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1_000)


def _micro_dollars(amount: Decimal) -> int:
    return int(amount.scaleb(6))
