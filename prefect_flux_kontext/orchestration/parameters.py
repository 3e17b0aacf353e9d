"""The parameter types of the flows, with choices for Prefect's form, and how they are opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

from prefect import Flow
from prefect.blocks.core import Block
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    PositiveInt,
    WithJsonSchema,
    with_config,
)
from typing_extensions import TypedDict

from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.credentials import FluxKontextCredentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.formats import ManifestFormat
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import MAX_VARIANTS
from prefect_flux_kontext.models import Mode, OutputFormat, Provider, RequestedRatio
from prefect_flux_kontext.references.identity import url_identity
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from prefect_flux_kontext.styles.styles import builtin_styles

Account = Annotated[FluxKontextCredentials | str | None, Field(examples=["my-account"])]
Prompt = Annotated[str | None, Field(examples=["Turn it into a loose watercolour"])]
AccountLimit = Annotated[str | None, Field(min_length=1, examples=["my-account"])]
GroupBudgets = Annotated[
    dict[str, dict[str, NonNegativeFloat]] | None, Field(examples=[{"team": {"blue": 20}}])
]
_BuiltinStyle = Annotated[
    str, WithJsonSchema({"type": "string", "enum": sorted(builtin_styles())})
]
StyleName = _BuiltinStyle | None
"""The parameter of a flow for one style of the package: a choice in the form."""
StyleNames = (
    Annotated[list[_BuiltinStyle], Field(title="built-in styles")]
    | Annotated[
        list[str],
        Field(title="styles and files of styles", examples=[["watercolour", "my-styles.yaml"]]),
    ]
    | Annotated[str, Field(title="one style")]
    | None
)
"""The parameter of a flow for styles: a choice in the form, or names and files as text."""

Variants = Annotated[int, Field(ge=1, le=MAX_VARIANTS)] | None

P = ParamSpec("P")
R = TypeVar("R")

# Longer texts are no path or URL, but a manifest or a reference by its content.
_MAX_RECORDED_CHARACTERS = 2_000


class FlowWithoutRows(Flow[P, R]):
    """A flow whose runs record a manifest or a reference as text only if it grants no access.

    Prefect refuses a run with more than 512 kB of parameters, and shows them to everyone. Rows,
    tables and signed URLs are therefore recorded as a placeholder.
    """

    def __call__(self, *args: Any, **parameters: Any) -> Any:
        """Call the flow. Advanced options may be given as keywords."""
        return super().__call__(*args, **self._group_advanced(parameters))

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Validate parameters. Advanced options may be beside the others, as in a call."""
        return super().validate_parameters(self._group_advanced(parameters))

    def _group_advanced(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if "advanced" not in self.parameters.properties:
            return parameters
        names = AdvancedOptions.__annotations__
        given = {name: value for name, value in parameters.items() if name in names}
        if not given:
            return parameters
        others = {name: value for name, value in parameters.items() if name not in given}
        rare = {name: value for name, value in given.items() if value is not None}
        return {**others, "advanced": {**(parameters.get("advanced") or {}), **rare}}

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters as the run records them."""
        return super().serialize_parameters(
            {name: _hide_rows(name, value) for name, value in parameters.items()}
        )

    def with_options(self, **options: Any) -> Any:
        """Return the flow with other options. It still records no rows."""
        changed: Any = super().with_options(**options)
        changed.__class__ = type(self)
        return changed


def flow_without_rows(**options: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a flow of a function, as `prefect.flow`, whose runs record no rows."""
    return lambda function: FlowWithoutRows(function, **options)


def _hide_rows(name: str, value: Any) -> Any:
    if name == "manifest" and not isinstance(value, str | os.PathLike):
        rows = f" of {len(value):,} rows" if isinstance(value, Sized) else ""
        return f"<{type(value).__name__}{rows}>"
    if name in ("manifest", "image") and isinstance(value, str):
        if len(value) > _MAX_RECORDED_CHARACTERS:
            return f"<text of {len(value):,} characters>"
        return url_identity(value)
    return value


_BLOCK_PREFIX = "block:"
_OUTPUT_BLOCK_TYPES = ("local-file-system", "remote-file-system", "s3-bucket")


def _validate_output(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str | OutputFolder) or _has_location(value):
        return value
    raise ValueError(
        "An output must be a path, an fsspec URL, `block:` and the reference of a storage Block, "
        f"or such a Block, not {type(value).__name__}."
    )


def _validate_options(value: Any) -> Any:
    if value is None or isinstance(value, dict) or _has_credentials(value):
        return value
    if isinstance(value, str) and value.startswith(_BLOCK_PREFIX):
        return value
    raise ValueError(
        "Storage options must be a dict, `block:aws-credentials/` and the name of a saved Block, "
        f"or such a Block, not {type(value).__name__}."
    )


Output = Annotated[
    Any,
    BeforeValidator(_validate_output),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "object"}],
            "examples": ["s3://my-bucket/restyled", "/data/restyled", "block:s3-bucket/mine"],
        }
    ),
]
"""The output parameter of a flow: text, or the object by which Prefect refers to a Block."""

StorageOptions = Annotated[
    Any,
    BeforeValidator(_validate_options),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}),
]
"""The parameter of a flow for the options of a filesystem: an object or text in the form."""


# A form would send the defaults of an open group, in place of those of the environment.
_CLOSED: dict[str, JsonValue] = {"default": None}


@with_config(ConfigDict(extra="forbid", title="options", use_attribute_docstrings=True))
class AdvancedOptions(TypedDict, total=False):
    """Options of a batch that are rarely set; a call may give each as a keyword."""

    output_names: str
    """Template of the image names, such as {style}/{id}.{ext}, with any column. Default:
    {id}/{style}.{ext}, or {id}.{ext} for rows without a style."""
    output_format: OutputFormat
    """As mode, format of the results."""
    provider: Provider
    """As mode, how the service routes the tasks."""
    manifest_format: ManifestFormat
    """Format of the manifest. Default: by its name, content type or content."""
    text_to_image: bool
    """Rows without a reference are meant, though other columns look like images."""
    variants: Variants
    """Images to make of each row that names no number, each paid for."""
    pilot: PositiveInt | None
    """Run a sample of this many rows first, with rows of each style, then pause for approval of
    the rest, with the contact sheet of the sample beside the price."""
    checks: list[str]
    """Own checks of the images, each module:function of an installed module. It takes a Pillow
    image and its row, and returns flags."""
    fit_references: bool
    """Shrink local and private reference images of more than 10 MB."""
    resubmit_unknown: bool
    """Pay again for rows whose submit reply was lost. They may have been billed already."""
    failure_policy: Annotated[FailurePolicy | None, Field(json_schema_extra=_CLOSED)]
    """What to do for each fail code. Default: the default policy."""
    cadence: Annotated[PollingCadence | None, Field(json_schema_extra=_CLOSED)]
    """When to poll for results. Default: the environment."""
    callback_url: str
    """URL that the service calls when an image is ready, in place of polling. Default:
    FLUX_KONTEXT_CALLBACK_URL."""
    budget_by: GroupBudgets
    """Most dollars for the rows with a value in a column, such as {"team": {"blue": 20}}. When it
    is reached, these rows are not submitted, and the others go on."""
    spend_by: list[str]
    """Columns by whose values the summary shows what was spent."""
    alert_above_usd: NonNegativeFloat
    """Emit the event flux-kontext.batch.spend-above once this run has spent more dollars than
    this."""
    storage_options: StorageOptions
    """Options of the output's filesystem, or block:aws-credentials/NAME. Prefect stores parameters
    in plain text, so keep keys in a Block."""
    partition_deployment: str
    """The deployment that runs partitions."""
    account_limit: AccountLimit
    """Name of a global concurrency limit in Prefect with the account's number of tasks. Flow runs
    with the same limit share the account. Default: each run uses the whole account."""


def build_manifest(
    source: Any,
    output: OutputFolder,
    account: FluxKontextCredentials,
    advanced: AdvancedOptions,
    *,
    prompt: str | None,
    columns: dict[str, str] | None,
    styles: str | list[str] | None,
    mode: Mode | None,
    aspect_ratio: RequestedRatio | None,
) -> Manifest:
    """Return the rows of a batch, which are the same in its plan, its run and its partitions."""
    variants = advanced.get("variants")
    parameters = {
        "mode": mode,
        "aspect_ratio": aspect_ratio,
        "output_format": advanced.get("output_format"),
        "provider": advanced.get("provider"),
        "variants": str(variants) if variants else None,
    }
    return Manifest(
        source,
        prompt,
        columns or {},
        styles,
        advanced.get("output_names"),
        str(output),
        parameters,
        format=advanced.get("manifest_format"),
        text_to_image=advanced.get("text_to_image", False),
        base_url=account.base_url,
    )


async def open_output(output: Any, storage_options: Any = None) -> OutputFolder:
    """Open the folder that the parameters of a flow name.

    The output is a path or URL, `block:` and a reference, a Block, or Prefect's own reference to
    one (`{"$ref": …}`). Storage options take precedence over those of an output Block; without
    any, a path or URL has those of the environment.

    Raises:
        ConfigurationError: The Block does not exist or names no location, or the filesystem
            cannot be used.
    """
    if isinstance(output, OutputFolder):
        return output
    options = await _load_options(storage_options)
    block = await _load_block(output)
    if block is not None:
        url, block_options = _read_location(block)
        return OutputFolder(url, block_options | options)
    if not isinstance(output, str | os.PathLike):
        raise ConfigurationError(f"Unsupported output type: {type(output).__name__}.")
    if _may_be_reference(os.fspath(output)):
        raise ConfigurationError(
            f"The output {output!r} may be a Block or a folder: write {_BLOCK_PREFIX}{output} for "
            f"the Block, ./{output} for a new folder."
        )
    if storage_options is None:
        options = FluxKontextSettings().fsspec_options()
    return OutputFolder(output, options)


def refer_to_output(value: Any, output: OutputFolder) -> str:
    """Return text by which another task can open the same folder; it contains no options.

    Raises:
        ConfigurationError: It is a Block that is not saved.
    """
    if isinstance(value, str) and value.startswith(_BLOCK_PREFIX):
        return value
    if isinstance(value, Block):
        name = value._block_document_name  # noqa: SLF001 - Prefect has no public name for it
        if name is None:
            raise ConfigurationError(
                f"The Block {type(value).__name__} is not saved, so other tasks could not open "
                "it. Save it first."
            )
        return f"{_BLOCK_PREFIX}{value.get_block_type_slug()}/{name}"
    return str(output)


def _may_be_reference(text: str) -> bool:
    return text.partition("/")[0] in _OUTPUT_BLOCK_TYPES and not Path(text).exists()


async def _load_block(value: Any) -> Block | None:
    """Return the Block that a parameter is or refers to, or None."""
    if isinstance(value, Block):
        return value
    try:
        if isinstance(value, dict) and "$ref" in value:
            return await Block.aload_from_ref(value["$ref"])
        if isinstance(value, str) and value.startswith(_BLOCK_PREFIX):
            return await Block.aload(value.removeprefix(_BLOCK_PREFIX))
    # Prefect raises RuntimeError if the saved fields are not valid any more, and KeyError if the
    # package that defines the type of the Block is not installed.
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigurationError(f"The Block {value} cannot be loaded: {error}") from None
    return None


async def _load_options(value: Any) -> dict[str, Any]:
    block = await _load_block(value)
    if block is not None:
        if not _has_credentials(block):
            raise ConfigurationError(
                f"The Block {type(block).__name__} has no keys for a store. To store images in "
                "it, give it as the output."
            )
        return _build_s3_options(block)
    return dict(value or {})


def _has_location(block: Any) -> bool:
    return isinstance(block, Block) and (
        hasattr(block, "bucket_name") or hasattr(block, "basepath")
    )


def _has_credentials(block: Any) -> bool:
    return isinstance(block, Block) and hasattr(block, "aws_client_parameters")


def _read_location(block: Any) -> tuple[str, dict[str, Any]]:
    """Return the URL and storage options of a storage Block."""
    if hasattr(block, "bucket_name"):  # prefect-aws: S3Bucket
        folder = getattr(block, "bucket_folder", "").strip("/")
        return f"s3://{block.bucket_name}/{folder}".rstrip("/"), _build_s3_options(
            block.credentials
        )
    if hasattr(block, "settings"):  # Prefect: RemoteFileSystem
        return str(block.basepath), dict(block.settings)
    if hasattr(block, "basepath"):  # Prefect: LocalFileSystem
        return str(Path(block.basepath or ".").expanduser()), {}
    raise ConfigurationError(
        f"The Block {type(block).__name__} has no location to store images in. Give a "
        "RemoteFileSystem, a LocalFileSystem or an S3Bucket as the output."
    )


def _build_s3_options(credentials: Any) -> dict[str, Any]:
    """Build the options of s3fs from an AwsCredentials or MinIOCredentials Block of prefect-aws.

    Raises:
        ConfigurationError: The Block names a role to assume, which s3fs does not support.
    """
    if getattr(credentials, "assume_role_arn", None):
        raise ConfigurationError(
            "These credentials assume a role, whose keys expire in the middle of a batch. Name a "
            "profile that assumes the role instead: botocore then renews the keys."
        )
    client = credentials.aws_client_parameters
    certificates = client.verify_cert_path
    options = {
        "key": _get_first(credentials, "aws_access_key_id", "minio_root_user"),
        "secret": _get_first(credentials, "aws_secret_access_key", "minio_root_password"),
        "token": _get_first(credentials, "aws_session_token"),
        "profile": _get_first(credentials, "profile_name"),
        "endpoint_url": client.endpoint_url,
        "use_ssl": None if client.use_ssl else False,
        "config_kwargs": client.config,
        "client_kwargs": _drop_empty(
            {
                "region_name": credentials.region_name,
                "verify": str(certificates) if certificates else client.verify,
                "api_version": client.api_version,
            }
        ),
    }
    return _drop_empty(options)


def _get_first(credentials: Any, *names: str) -> Any:
    found = (getattr(credentials, name) for name in names if hasattr(credentials, name))
    value: Any = next(found, None)
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


def _drop_empty(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, {})}
