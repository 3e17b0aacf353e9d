"""Transient filesystem errors are retried, and messages hide secrets."""

import asyncio
import errno

import aiohttp
import botocore.exceptions
import pytest

from prefect_flux_kontext.errors import LedgerError, StorageError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.storage.atomic import create_file
from prefect_flux_kontext.storage.errors import describe_error, is_transient, is_unsupported
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.ledger.conftest import Faulty


def s3_error(code, status):
    reply = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(reply, "PutObject")


def with_cause(error, cause):
    error.__cause__ = cause
    return error


class GcsError(Exception):
    """Shaped as gcsfs' HttpError."""

    code = 503


class AzureError(Exception):
    """Shaped as Azure's HttpResponseError."""

    status_code = 429


BUSY = [
    OSError(errno.EBUSY, "Please reduce your request rate"),
    s3_error("SlowDown", 503),
    s3_error("TooManyRequests", 429),
    with_cause(OSError("what s3fs makes of an unknown code"), s3_error("429", 429)),
    with_cause(OSError(errno.EREMOTEIO, "We encountered an internal error"), s3_error("500", 500)),
    RuntimeError("SlowDown"),
    s3_error("OperationAborted", 409),
    with_cause(
        OSError(errno.EIO, "what s3fs makes of it"), s3_error("ConditionalRequestConflict", 409)
    ),
    GcsError(),
    AzureError(),
]
CONNECTION_ERRORS = [
    ConnectionResetError(104, "reset"),
    TimeoutError("slow"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://127.0.0.1:1"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
]
PERMANENT = [
    PermissionError("Access Denied"),
    FileNotFoundError("no such bucket"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "input/output error"),
    IsADirectoryError("it is a folder"),
    ValueError("no such region"),
    s3_error("AccessDenied", 403),
    s3_error("NotImplemented", 501),
    s3_error("PreconditionFailed", 412),
    RuntimeError("anything"),
]


@pytest.mark.parametrize("error", BUSY, ids=repr)
def test_busy_errors_are_transient_for_a_minute(error):
    assert is_transient(error, 1, 0)
    assert is_transient(error, 50, 59)
    assert not is_transient(error, 2, 60)


@pytest.mark.parametrize("error", CONNECTION_ERRORS, ids=repr)
def test_connection_errors_allow_four_attempts(error):
    assert [is_transient(error, attempt, 0) for attempt in (1, 2, 3, 4)] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_other_errors_are_not_transient(error):
    assert not is_transient(error, 1, 0)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSYS, "A header you provided is not implemented"),
        with_cause(OSError(errno.EIO, "?"), s3_error("XNotImplemented", 501)),
        NotImplementedError("no mode create"),
    ],
    ids=repr,
)
def test_unsupported_operation_is_recognized(error):
    assert is_unsupported(error)
    assert not is_transient(error, 1, 0)


def test_other_errors_are_not_unsupported():
    assert not any(map(is_unsupported, [*BUSY, *CONNECTION_ERRORS, PERMANENT[0], PERMANENT[2]]))


@pytest.mark.parametrize(
    "error",
    [
        with_cause(OSError(errno.EINVAL, "failed"), s3_error("PreconditionFailed", 412)),
        s3_error("412", 412),
    ],
    ids=repr,
)
def test_refused_condition_means_that_the_file_exists(error, tmp_path):
    """As a store says it that does not name the condition."""
    fs = Faulty(OutputFolder(f"memory://{tmp_path.name}").fs, {"pipe_file"}, error)
    with pytest.raises(FileExistsError):
        create_file(fs, "/a.json", b"1")


def test_is_transient_accepts_circular_causes():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_transient(first, 1, 0)


def test_describe_error_hides_secret_options():
    options = {
        "key": "canary-key",
        "secret": "canary-key-and-more",
        "client_kwargs": {"region_name": "eu-north-1", "aws_session_token": "canary-token"},
        "endpoint_url": "http://127.0.0.1:9000",
        "anon": False,
        "short": "b",
    }
    error = ValueError("canary-key canary-key-and-more canary-token eu-north-1 127.0.0.1:9000 b")
    assert describe_error(error, options) == "ValueError: … … … eu-north-1 127.0.0.1:9000 b"


SECRETS = {"secret": "canary-secret"}


class TestCalls:
    pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]  # noqa: RUF012

    @pytest.fixture
    def output(self, tmp_path):
        return OutputFolder(f"memory://{tmp_path.name}", SECRETS)

    async def test_unsupported_operation_is_tried_once(self, output):
        store = RecordStore(output.below("_ledger"))
        error = OSError(errno.ENOSYS, "If-None-Match")
        store._fs = Faulty(store._fs, {"pipe_file"}, error, times=9)
        with pytest.raises(LedgerError, match="after 1 attempt: "):
            await store.create("1.json", b"one")
        assert store._fs.times == 8

    @pytest.mark.parametrize("error", [BUSY[0], BUSY[1]], ids=repr)
    async def test_busy_store_is_retried(self, output, error):
        fs = output.fs
        output.fs = Faulty(fs, {"pipe_file", "cat_file"}, error, times=5)
        await output.write("cat.jpg", b"a cat")
        assert output.fs.times == 0
        output.fs.times = 3
        assert await output.read("cat.jpg") == b"a cat"

    async def test_busy_store_fails_after_a_minute(self, output):
        """Retries of a busy store are spread out and end after about a minute."""
        loop = asyncio.get_running_loop()
        output.fs = Faulty(output.fs, {"pipe_file"}, BUSY[0], times=9_999)
        began = loop.time()
        with pytest.raises(
            StorageError, match=r"cat\.jpg cannot be written: OSError: .*request rate"
        ):
            await output.write("cat.jpg", b"a cat")
        assert 60 <= loop.time() - began <= 90
        assert 5 <= 9_999 - output.fs.times <= 30

    async def test_permanent_errors_are_not_retried(self, output):
        for call in (output.write("a", b""), output.read("a"), output.remove("a")):
            output.fs = Faulty(
                output.fs,
                {"pipe_file", "cat_file", "rm_file"},
                PermissionError("canary-secret is not welcome"),
            )
            with pytest.raises(StorageError, match="PermissionError: … is not welcome") as caught:
                await call
            assert output.fs.times == 98
            assert "canary" not in repr(caught.value)

    async def test_missing_file_is_no_error(self, output):
        assert await output.read("none.jpg") is None
        await output.remove("none.jpg")

    async def test_ledger_waits_for_a_busy_store(self, output):
        store = RecordStore(output.below("_ledger"))
        store._fs = Faulty(store._fs, {"pipe_file"}, BUSY[0], times=7)
        assert await store.create("1.json", b"one")
        assert store._fs.times == 0
        assert await store.read("1.json") == b"one"
