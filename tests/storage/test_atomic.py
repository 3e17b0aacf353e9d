"""A file is created whole or not at all, whatever the system and the filesystem know."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from prefect_flux_kontext.storage.atomic import create_file

LOCAL = LocalFileSystem()


@pytest.fixture(params=["as it is here", "no unnamed files", "none in this folder", "no /proc"])
def system(request, monkeypatch):
    """The ways in which a system may lack what Linux's own filesystems have."""
    if request.param == "no unnamed files":
        monkeypatch.delattr(os, "O_TMPFILE")
    elif request.param == "none in this folder":
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


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("data", [b"", b"a record", os.urandom(3_000_000)], ids=len)
def test_a_file_is_created_whole_in_a_folder_that_is_made(tmp_path, data):
    create_file(LOCAL, str(tmp_path / "a" / "b" / "1.json"), data)
    assert (tmp_path / "a" / "b" / "1.json").read_bytes() == data
    assert names(tmp_path / "a" / "b") == ["1.json"]


@pytest.mark.usefixtures("system")
def test_what_is_there_stays(tmp_path):
    create_file(LOCAL, str(tmp_path / "1.json"), b"first")
    with pytest.raises(FileExistsError):
        create_file(LOCAL, str(tmp_path / "1.json"), b"second")
    assert (tmp_path / "1.json").read_bytes() == b"first"
    assert names(tmp_path) == ["1.json"]


@pytest.mark.usefixtures("system")
def test_others_may_read_it_as_any_file_of_this_user(tmp_path):
    before = os.umask(0o027)
    try:
        create_file(LOCAL, str(tmp_path / "1.json"), b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "1.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("system")
def test_what_does_not_fit_is_not_seen_at_all(tmp_path):
    """A write may be cut short without an error; only the next one tells."""
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
def test_no_descriptor_is_left_open_when_it_goes_wrong(tmp_path, monkeypatch, call):
    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    before = len(names(Path("/proc/self/fd")))
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="Input/output error"):
        create_file(LOCAL, str(tmp_path / "1.json"), b"x")
    assert len(names(Path("/proc/self/fd"))) == before
    assert names(tmp_path) == []
