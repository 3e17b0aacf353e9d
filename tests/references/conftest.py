"""A bucket of a cloud whose package is not installed, by its interface alone."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from tests.support.pictures import picture

SIGNATURE = "X-Goog-Signature=s3cr3t"


class Bucket(MemoryFileSystem):
    """Objects in memory, with versions and signed URLs."""

    protocol = "gs"
    where = "https://signed.test"
    store = {}  # noqa: RUF012 - as in fsspec: one for all
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def info(self, path, **how):
        if "denied" in path:
            raise PermissionError(path)
        if "broken" in path:
            raise OSError("no route to the bucket")
        return super().info(path, **how) | {"etag": "v1"}

    def sign(self, path, expiration):
        return f"{self.where}{path}?life={expiration}&{SIGNATURE}"


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setitem(_registry, "gs", Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    fs = fsspec.filesystem("gs")
    fs.pipe_file("photos/cat.jpg", picture())
    return fs
