"""Files are created whole or not at all, whatever the system supports."""

import contextlib
import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from prefect_flux_kontext.storage.atomic import create_file

LOCAL = LocalFileSystem()


@pytest.fixture(
    params=["this system", "no unnamed files", "not supported in this folder", "no /proc"]
)
def system(request, monkeypatch):
    """Systems without some of the features of Linux's own filesystems."""
    if request.param == "no unnamed files":
        monkeypatch.delattr(os, "O_TMPFILE")
    elif request.param == "not supported in this folder":
        opened = os.open

        def refuse(path, flags, *mode, **how):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return opened(path, flags, *mode, **how)

        monkeypatch.setattr(os, "open", refuse)
    elif request.param == "no /proc":
        link = os.link

        def lost(source, target, **how):
            if str(source).startswith("/proc/"):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            link(source, target, **how)

        monkeypatch.setattr(os, "link", lost)
    return request.param


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def open_below(folder):
    """Return this process's open files in a folder; other threads may open files elsewhere."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    return [path for path in found if path.startswith(str(folder))]


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("data", [b"", b"a record", os.urandom(3_000_000)], ids=len)
def test_create_makes_missing_folders(tmp_path, data):
    create_file(LOCAL, str(tmp_path / "a" / "b" / "1.json"), data)
    assert (tmp_path / "a" / "b" / "1.json").read_bytes() == data
    assert names(tmp_path / "a" / "b") == ["1.json"]


@pytest.mark.usefixtures("system")
def test_create_keeps_an_existing_file(tmp_path):
    create_file(LOCAL, str(tmp_path / "1.json"), b"first")
    with pytest.raises(FileExistsError):
        create_file(LOCAL, str(tmp_path / "1.json"), b"second")
    assert (tmp_path / "1.json").read_bytes() == b"first"
    assert names(tmp_path) == ["1.json"]


@pytest.mark.usefixtures("system")
def test_created_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        create_file(LOCAL, str(tmp_path / "1.json"), b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "1.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("system")
def test_failed_create_leaves_no_file(tmp_path):
    """A short write raises no error; only the next write does."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            create_file(LOCAL, str(tmp_path / "1.png"), b"x" * 150_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_failed_create_closes_its_descriptors(tmp_path, monkeypatch, call):
    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="Input/output error"):
        create_file(LOCAL, str(tmp_path / "1.json"), b"x")
    assert open_below(tmp_path) == []
    assert names(tmp_path) == []
