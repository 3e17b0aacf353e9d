"""The filesystems of a ledger: a disk, memory, and an S3 server."""

import contextlib
import itertools

import pytest

from prefect_flux_kontext.ledger.store import RecordStore
from tests.support.s3 import s3_server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3():
    """A bucket's URL."""
    with s3_server() as (url, _):
        yield url


@pytest.fixture(params=["disk", "memory", "s3"])
def root(request, tmp_path):
    """The URL of an empty ledger."""
    match request.param:
        case "disk":
            return f"{tmp_path}/a folder/_ledger"
        case "memory":
            return f"memory://ledger-{next(_numbers)}"
        case _:
            return f"{request.getfixturevalue('s3')}/ledger-{next(_numbers)}"


@pytest.fixture
def store(root):
    return RecordStore(root)


class Faulty:
    """A filesystem whose calls of one kind fail, before or after their effect."""

    def __init__(self, fs, calls, error, *, effect=False, times=99):
        self._fs = fs
        self._calls = calls
        self._error = error
        self._effect = effect
        self.times = times

    def __getattr__(self, name):
        real = getattr(self._fs, name)
        if name not in self._calls:
            return real

        def call(*args, **how):
            if self.times == 0:
                return real(*args, **how)
            self.times -= 1
            if self._effect:
                with contextlib.suppress(FileExistsError):
                    real(*args, **how)
            raise self._error

        return call


@pytest.fixture
def faulty(monkeypatch):
    """Make calls of a store's filesystem fail, without pauses between retries."""
    monkeypatch.setattr("prefect_flux_kontext.ledger.store.jittered_backoff", lambda *_, **__: 0)

    def make(store, calls, error, **how):
        store._fs = Faulty(store._fs, calls, error, **how)
        return store._fs

    return make
