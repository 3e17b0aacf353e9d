"""A fake of a cloud bucket whose fsspec package is not installed."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from tests.support.pictures import picture

SIGNATURE = "X-Goog-Signature=s3cr3t"


class Bucket(MemoryFileSystem):
    """In-memory objects with versions and signed URLs."""

    protocol = "gs"
    base_url = "https://signed.test"
    store = {}  # noqa: RUF012 - shared by all instances, as in fsspec
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
        return f"{self.base_url}{path}?life={expiration}&{SIGNATURE}"


@pytest.fixture
def bucket(monkeypatch):
    """Return a `gs://` filesystem that holds one image."""
    monkeypatch.setitem(_registry, "gs", Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    fs = fsspec.filesystem("gs")
    fs.pipe_file("photos/cat.jpg", picture())
    return fs
