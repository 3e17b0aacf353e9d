"""Files in their place on any fsspec filesystem, such that no reader ever sees half of one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
from typing import TYPE_CHECKING, Any

import fsspec

from prefect_flux_kontext.atomic import create_file, replace_file
from prefect_flux_kontext.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LONGEST_NAME = 80
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_reserved(name: str) -> bool:
    """Whether Windows keeps the name for itself, whatever its extension."""
    return _RESERVED.fullmatch(name) is not None


def safe_name(text: str) -> str:
    """A file name made from any text: no folders, no surprises, at most 93 characters.

    Text that is no plain name is spelled with dashes and gets a tilde and a short hash of itself.
    No plain name has a tilde, so two different texts never share a name.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")
    if _RESERVED.fullmatch(plain):
        # Windows reserves them with any extension, so a hash behind does not help.
        plain = f"_{plain}"
    plain = plain[:_LONGEST_NAME] or "unnamed"
    if plain == text:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{plain}~{digest}"


class OutputFolder:
    """A folder or prefix to write to, given as an fsspec URL or a local path.

    Args:
        url: For example `out/`, `s3://bucket/prefix` or `memory://pictures`.

    Raises:
        ConfigurationError: There is no such kind of filesystem here, or the URL chains several.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        location = os.fspath(url)
        if "::" in location or not location.strip():
            raise ConfigurationError(f"The output {location!r} is not one folder or URL.")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(location)
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise ConfigurationError(f"The output {location!r} cannot be used: {error}") from None

    def __str__(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    async def write(self, name: str, data: bytes) -> str:
        """Put a whole file in place, over an older one of that name, and return its URI.

        Raises:
            StorageError: The filesystem refused; no half file is left to be seen.
        """
        return await self._write(replace_file, name, data)

    def uri(self, name: str) -> str:
        """The URI of a file here."""
        return str(self._fs.unstrip_protocol(self._path(name)))

    def relative(self, uri: str) -> str:
        """The name of a file that `write` put here, by its URI."""
        return uri.removeprefix(f"{self}/")

    async def write_apart(self, names: Sequence[str], data: bytes) -> str:
        """Put a file under the first name that is free or holds these bytes, and return its URI.

        Args:
            names: From the wanted name to one that nothing else has, which is written over.
            data: The whole file.

        Raises:
            StorageError: The filesystem refused.
        """
        for name in names[:-1]:
            try:
                return await self._write(create_file, name, data)
            except FileExistsError:
                if await self.read(name) == data:
                    return self.uri(name)
        return await self.write(names[-1], data)

    async def _write(self, how: Callable[[Any, str, bytes], None], name: str, data: bytes) -> str:
        try:
            await asyncio.to_thread(how, self._fs, self._path(name), data)
        except FileExistsError:
            raise
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise StorageError(
                f"The output refused {self.uri(name)}: {type(error).__name__}: {error}"
            ) from None
        return self.uri(name)

    async def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None where there is none.

        Raises:
            StorageError: The filesystem refused.
        """
        try:
            data: bytes = await asyncio.to_thread(self._fs.cat_file, self._path(name))
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise StorageError(
                f"{self.uri(name)} cannot be read: {type(error).__name__}: {error}"
            ) from None
        return data

    async def exists(self, name: str) -> bool:
        """Whether a file is there.

        Raises:
            StorageError: The filesystem refused.
        """
        try:
            return bool(await asyncio.to_thread(self._fs.exists, self._path(name)))
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise StorageError(
                f"{self.uri(name)} cannot be looked for: {type(error).__name__}: {error}"
            ) from None

    async def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            StorageError: The filesystem refused.
        """
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(self._fs.rm_file, self._path(name))

    async def check_writable(self) -> None:
        """Write and remove a probe, so that a wrong output is known before anything is paid.

        Raises:
            ConfigurationError: The folder cannot be written to.
        """
        probe = f".probe-{secrets.token_hex(6)}"
        try:
            await self.write(probe, b"")
            await asyncio.to_thread(self._fs.rm_file, self._path(probe))
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise ConfigurationError(f"{self} cannot be written to. {error}") from None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
