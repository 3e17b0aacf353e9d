"""Types of parameters, with examples for the form that Prefect makes of them.

Annotations are real objects here, as in `flows`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect.blocks.core import Block
from pydantic import BeforeValidator, Field, WithJsonSchema

from prefect_flux_kontext.credentials import FluxKontextCredentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Account", "Prompt", "StyleNames"]

Account = Annotated[FluxKontextCredentials | str | None, Field(examples=["my-account"])]
Prompt = Annotated[str | None, Field(examples=["Turn it into a loose watercolour"])]
StyleNames = Annotated[str | list[str] | None, Field(examples=[["watercolour", "my-styles.yaml"]])]

BLOCK = "block:"
_SLUGS = ("local-file-system", "remote-file-system", "s3-bucket")


def _valid_output(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str | OutputFolder) or _has_place(value):
        return value
    raise ValueError(
        "An output is a path, an fsspec URL, `block:` with the reference of a storage Block, or "
        f"such a Block, not {type(value).__name__}."
    )


def _valid_options(value: Any) -> Any:
    if value is None or isinstance(value, dict) or _has_keys(value):
        return value
    if isinstance(value, str) and value.startswith(BLOCK):
        return value
    raise ValueError(
        "Storage options are a dict, `block:aws-credentials/` with the name of a saved Block, or "
        f"such a Block, not {type(value).__name__}."
    )


Output = Annotated[
    Any,
    BeforeValidator(_valid_output),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "object"}],
            "examples": ["s3://my-bucket/restyled", "/data/restyled", "block:s3-bucket/mine"],
        }
    ),
]
"""The parameter of a flow that takes an output: text, or an object by which Prefect refers to a
Block."""

StorageOptions = Annotated[
    Any,
    BeforeValidator(_valid_options),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}),
]
"""The parameter of a flow that takes a filesystem's options; a form offers an object or text."""


async def open_output(output: Any, storage_options: Any = None) -> OutputFolder:
    """The folder that a flow's parameters mean, as they were given or as Prefect keeps them.

    Args:
        output: A path or URL, `block:` with a reference, a Block, or Prefect's own reference to
            one (`{"$ref": …}`).
        storage_options: What the filesystem needs to know, or the AWS credentials Block that says
            it, over what the output's Block says. None leaves the environment's for a path or URL.

    Raises:
        ConfigurationError: There is no such Block, or none that has a place, or the filesystem
            cannot be used.
    """
    if isinstance(output, OutputFolder):
        return output
    options = await _options(storage_options)
    block = await _block(output)
    if block is not None:
        url, told = _place(block)
        return OutputFolder(url, told | options)
    if not isinstance(output, str | os.PathLike):
        raise ConfigurationError(f"An output of type {type(output).__name__} is not kept as such.")
    if _may_be_reference(os.fspath(output)):
        raise ConfigurationError(
            f"The output {output!r} may be a Block or a folder: write {BLOCK}{output} for the "
            f"Block, ./{output} for a new folder."
        )
    if storage_options is None:
        options = FluxKontextSettings().fsspec_options()
    return OutputFolder(output, options)


def _may_be_reference(text: str) -> bool:
    return text.partition("/")[0] in _SLUGS and not Path(text).exists()


async def _block(value: Any) -> Block | None:
    """The Block that is meant, if one is."""
    if isinstance(value, Block):
        return value
    try:
        if isinstance(value, dict) and "$ref" in value:
            return await Block.aload_from_ref(value["$ref"])
        if isinstance(value, str) and value.startswith(BLOCK):
            return await Block.aload(value.removeprefix(BLOCK))
    # Prefect's RuntimeError: it was saved with fields that are not valid any more. KeyError: what
    # knows Blocks of its type is not installed.
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigurationError(f"The Block {value} cannot be loaded: {error}") from None
    return None


async def _options(value: Any) -> dict[str, Any]:
    block = await _block(value)
    if block is not None:
        if not _has_keys(block):
            raise ConfigurationError(
                f"The Block {type(block).__name__} has no keys for a store. To store to it, give "
                "it as the output."
            )
        return _s3_options(block)
    return dict(value or {})


def _has_place(block: Any) -> bool:
    return isinstance(block, Block) and (
        hasattr(block, "bucket_name") or hasattr(block, "basepath")
    )


def _has_keys(block: Any) -> bool:
    return isinstance(block, Block) and hasattr(block, "aws_client_parameters")


def _place(block: Any) -> tuple[str, dict[str, Any]]:
    """The URL and storage options of a Block that has a place."""
    if hasattr(block, "bucket_name"):  # prefect-aws: S3Bucket
        folder = getattr(block, "bucket_folder", "").strip("/")
        return f"s3://{block.bucket_name}/{folder}".rstrip("/"), _s3_options(block.credentials)
    if hasattr(block, "settings"):  # Prefect: RemoteFileSystem
        return str(block.basepath), dict(block.settings)
    if hasattr(block, "basepath"):  # Prefect: LocalFileSystem
        return str(Path(block.basepath or ".").expanduser()), {}
    raise ConfigurationError(
        f"The Block {type(block).__name__} has no place to store to. An output may be a "
        "RemoteFileSystem, a LocalFileSystem or an S3Bucket."
    )


def _s3_options(credentials: Any) -> dict[str, Any]:
    """What s3fs needs, from prefect-aws' AwsCredentials or MinIOCredentials.

    Raises:
        ConfigurationError: They name a role to assume, which s3fs does not do.
    """
    if getattr(credentials, "assume_role_arn", None):
        raise ConfigurationError(
            "These credentials assume a role, whose keys expire in the middle of a batch. Name a "
            "profile that assumes it instead: botocore then renews them."
        )
    client = credentials.aws_client_parameters
    options = {
        "key": _first(credentials, "aws_access_key_id", "minio_root_user"),
        "secret": _first(credentials, "aws_secret_access_key", "minio_root_password"),
        "token": _first(credentials, "aws_session_token"),
        "profile": _first(credentials, "profile_name"),
        "endpoint_url": client.endpoint_url,
        "use_ssl": None if client.use_ssl else False,
        "config_kwargs": client.config,
        "client_kwargs": _given(
            {
                "region_name": credentials.region_name,
                "verify": _verified(client),
                "api_version": client.api_version,
            }
        ),
    }
    return _given(options)


def _verified(client: Any) -> Any:
    path = client.verify_cert_path
    return client.verify if path is None else str(path)


def _first(credentials: Any, *names: str) -> Any:
    found = (getattr(credentials, name) for name in names if hasattr(credentials, name))
    value: Any = next(found, None)
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, {})}
