"""Files are visible whole or not at all."""

import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from prefect_flux_kontext.errors import ConfigurationError, StorageError
from prefect_flux_kontext.ledger.probe import probe_store
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.s3 import s3_server


@pytest.fixture(scope="module")
def s3():
    with s3_server() as (bucket, client):
        yield bucket, client


@pytest.fixture(params=["local", "file", "memory", "s3"])
def folder(request, tmp_path):
    """The URL of an empty folder, on each kind of filesystem."""
    name = f"{tmp_path.name}/out"
    if request.param == "local":
        return str(tmp_path / "out")
    if request.param == "file":
        return f"file://{tmp_path}/out"
    if request.param == "memory":
        return f"memory://{name}"
    return f"{request.getfixturevalue('s3')[0]}/{name}"


def files_below(url):
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return sorted(path.removeprefix(root).lstrip("/") for path in fs.find(root))


@pytest.mark.anyio
async def test_written_file_is_readable_at_its_uri(folder):
    uri = await OutputFolder(folder).write("cat.jpg", b"\xff\xd8 a cat")
    assert uri.endswith("/out/cat.jpg")
    with fsspec.open(uri, "rb") as file:
        assert file.read() == b"\xff\xd8 a cat"
    assert files_below(folder) == ["cat.jpg"]


@pytest.mark.anyio
async def test_write_replaces_an_older_file(folder):
    output = OutputFolder(folder)
    for data in (b"an old and longer cat", b"a new cat"):
        uri = await output.write("cat.jpg", data)
    with fsspec.open(uri, "rb") as file:
        assert file.read() == b"a new cat"
    assert files_below(folder) == ["cat.jpg"]


@pytest.mark.anyio
async def test_check_writable_leaves_no_file(folder):
    await OutputFolder(folder).check_writable()
    assert files_below(folder) == []


@pytest.mark.anyio
async def test_concurrent_writes_leave_one_whole_file(folder):
    output = OutputFolder(folder)
    contents = [bytes([number]) * 50_000 for number in range(8)]
    await asyncio.gather(*(output.write("cat.jpg", data) for data in contents))
    with fsspec.open(f"{folder}/cat.jpg", "rb") as file:
        assert file.read() in contents
    assert files_below(folder) == ["cat.jpg"]


@pytest.mark.anyio
async def test_output_can_be_a_bucket(s3):
    bucket, client = s3
    assert await OutputFolder(bucket).write("top.jpg", b"top") == f"{bucket}/top.jpg"
    assert client.get_object(Bucket="pictures", Key="top.jpg")["Body"].read() == b"top"
    client.delete_object(Bucket="pictures", Key="top.jpg")


@pytest.mark.anyio
async def test_check_writable_finds_a_missing_bucket(s3):
    with pytest.raises(ConfigurationError, match="s3://no-such-bucket/x cannot be written to"):
        await OutputFolder("s3://no-such-bucket/x").check_writable()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "  ",
        "nope://x",
        "simplecache::s3://bucket/x",
        "memory://x::file:///etc",
        "zip://x",
        "reference://x",
        "cached://x",
        "github://x",
    ],
)
def test_unsupported_output_urls_are_rejected(url):
    with pytest.raises(ConfigurationError, match="output"):
        OutputFolder(url)


@pytest.mark.anyio
@pytest.mark.parametrize("url", ["{file}", "{file}/below", "/proc/nobody/writes/here", "a\0b"])
async def test_check_writable_finds_unwritable_outputs(url, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    output = OutputFolder(url.format(file=file))
    with pytest.raises(ConfigurationError, match="cannot be written to"):
        await output.check_writable()
    assert file.read_text() == "in the way"


@pytest.mark.anyio
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
async def test_check_writable_finds_a_disk_without_links(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    output = OutputFolder(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"cannot be written to.*no hard links") as caught:
        await output.check_writable()
    assert "s3" not in str(caught.value).lower()
    with pytest.raises(ConfigurationError, match=r"after 1 attempt: .*no hard links"):
        await probe_store(open_ledger_store(output))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.anyio
async def test_check_writable_accepts_a_left_over_probe(folder):
    output = OutputFolder(folder)
    await output.write(".probe", b"")
    await output.check_writable()


@pytest.mark.anyio
async def test_check_writable_finds_a_read_only_filesystem():
    with pytest.raises(ConfigurationError, match="cannot be written to"):
        await OutputFolder("data://x").check_writable()


@pytest.mark.anyio
async def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    output = OutputFolder(tmp_path)
    await output.write("cat.jpg", b"the old cat")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=r"cat\.jpg cannot be written: OSError: .*No space left"
    ):
        await output.write("cat.jpg", b"the new cat")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]
    assert (tmp_path / "cat.jpg").read_bytes() == b"the old cat"


@pytest.mark.anyio
async def test_write_over_a_folder_is_a_storage_error(tmp_path):
    (tmp_path / "cat.jpg" / "in the way").mkdir(parents=True)
    with pytest.raises(StorageError):
        await OutputFolder(tmp_path).write("cat.jpg", b"a cat")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]


WRITER = """
import asyncio, sys
from prefect_flux_kontext.storage.filesystem import OutputFolder
from prefect_flux_kontext.errors import StorageError

async def main():
    output = OutputFolder(sys.argv[1])
    data = bytes(int(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.readline()
    while True:
        try:
            await output.write("big.png", data)
        except StorageError as error:
            print(error)
            return
        if sys.argv[3] == "once":
            return

asyncio.run(main())
"""


def writer(folder, size, how, **popen):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(size), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **popen,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_write_shows_no_partial_file(tmp_path):
    size, midway = 16 * 2**20, 0
    for number in range(4):
        folder = tmp_path / str(number)
        with writer(folder, size, "forever") as process:
            process.stdin.write("go\n")
            process.stdin.flush()
            # Wait until the write has begun.
            while not list(folder.glob(".*.part")):
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            process.communicate()
        midway += len(list(folder.glob(".*.part")))
        for path in folder.glob("*.png"):
            assert path.stat().st_size == size
    assert midway, "no kill came in the middle of writing"


def test_full_disk_leaves_no_file(tmp_path):
    def small_files_only():
        # The kernel refuses to let any file grow beyond it, as a full disk would.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    with writer(tmp_path / "out", 3 * 2**20, "once", preexec_fn=small_files_only) as process:
        output_text, _ = process.communicate("go\n")
    assert process.returncode == 0
    assert "big.png" in output_text
    assert "File too large" in output_text
    assert list(Path(tmp_path / "out").iterdir()) == []
