"""The state of the sandbox: accounts with their limits, tasks and the bill."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import math
import random
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from prefect_flux_kontext.sandbox.contract import Refusal, read_submission
from prefect_flux_kontext.sandbox.tasks import LatencyModel, Task, dollars, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from decimal import Decimal
    from typing import Any

    from prefect_flux_kontext.sandbox.contract import JsonObject, Submission
    from prefect_flux_kontext.sandbox.settings import SandboxSettings

_MINUTE = 60.0


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
            raise Refusal(402, "insufficient balance", f"{dollars(account.balance)} dollars left")
        account.balance -= price
        task = self._new_task(key, submission, fingerprint(payload), base_url, price, now)
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
            "dollars": dollars(numbers["charged"]),
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


def _micro_dollars(amount: Decimal) -> int:
    return int(amount.scaleb(6))
