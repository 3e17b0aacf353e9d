"""Data models: requests, tasks, statuses, results and stored images.

All are pydantic models that can be saved as JSON and loaded again, so that a task can be waited
for later, by another flow or on another machine.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prefect_flux_kontext.redaction import is_plain_url, redact_text

__all__ = [
    "AspectRatio",
    "GenerationRequest",
    "GenerationResult",
    "GenerationTask",
    "Mode",
    "OutputFormat",
    "Provider",
    "RequestedRatio",
    "StoredImage",
    "TaskStatus",
    "utc_now",
]

MAX_PROMPT_CHARACTERS = 10_000

_THUMBNAIL_PIXELS = 320

Mode = Literal["pro", "max"]
AspectRatio = Literal["21:9", "16:9", "4:3", "1:1", "3:4", "9:16"]
RequestedRatio = Literal["match", "21:9", "16:9", "4:3", "1:1", "3:4", "9:16"]
OutputFormat = Literal["jpeg", "png"]
Provider = Literal["auto", "value", "official"]


def utc_now() -> datetime:
    """Return the current time in UTC, with its time zone."""
    return datetime.now(UTC)


class _RedactedRepr(BaseModel):
    """Base class of models whose repr holds no secrets.

    The repr leaves out the query strings of URLs, which may be signed, passwords, and the
    callback URL.
    """

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            if name in ("image_urls", "result_urls"):
                yield name, [redact_text(url).partition("?")[0] for url in value]
            elif name != "callback_url" or value is None:
                yield name, redact_text(value) if isinstance(value, str) else value


class GenerationRequest(_RedactedRepr):
    """The request for one image: a prompt, and a reference image for style transfer.

    Limits and defaults are those of the service's API reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    """Prompt, 1 to 10,000 characters."""
    image_urls: list[str] = Field(default_factory=list)
    """URL of the reference image, which the service can fetch: the service takes one. Empty: text
    to image."""
    mode: Mode = "pro"
    """`pro`: higher quality, slower. `max`: balanced."""
    aspect_ratio: RequestedRatio = "16:9"
    """Ratio of width to height. `match`, the default with a reference image: the one nearest to
    the reference's own."""
    matched_ratio: AspectRatio | None = None
    """What `match` came to. Set before the submit; `match` without it sends 16:9."""
    match_note: str | None = None
    """Why `match` came to 16:9 without knowing the reference's ratio."""
    output_format: OutputFormat = "jpeg"
    """Image format of the result."""
    provider: Provider = "auto"
    """Route of the task at the service."""
    callback_url: str | None = None
    """Public HTTPS URL that the service calls when the task ends."""
    request_type: Literal["async", "callback"] = "async"
    """`callback` if, and only if, there is a `callback_url`."""
    prompt_upsampling: bool | None = None
    """Whether the service elaborates the prompt. Unset: not sent."""
    enable_translation: bool | None = None
    """Whether the service translates the prompt to English. Unset: not sent."""
    safety_tolerance: int | None = Field(default=None, ge=0, le=2)
    """Safety tolerance from 0 (strict) to 2 (tolerant)."""
    watermark: str | None = None
    """Text of a watermark on the image."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Additional model input, merged into the request unchanged."""

    @field_validator("extra")
    @classmethod
    def _validate_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"extra is not JSON: {error}") from None
        return extra

    @model_validator(mode="before")
    @classmethod
    def _set_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("aspect_ratio") is None:
            ratio = "match" if values.get("image_urls") else "16:9"
            values = {**values, "aspect_ratio": ratio}
        if values.get("callback_url"):
            values = {"request_type": "callback", **values}
        return values

    @model_validator(mode="after")
    def _validate_callback(self) -> Self:
        if (self.request_type == "callback") != (self.callback_url is not None):
            raise ValueError(
                "request_type 'callback' needs a callback_url, and a callback_url needs "
                "request_type 'callback'"
            )
        return self

    @model_validator(mode="after")
    def _validate_references(self, info: ValidationInfo) -> Self:
        # JSON is a record of a ledger, which may be older than the limit.
        if len(self.image_urls) > 1 and info.mode == "python":
            raise ValueError(
                f"image_urls has {len(self.image_urls)} reference images and the service takes one"
            )
        if self.aspect_ratio == "match" and not self.image_urls:
            raise ValueError("aspect_ratio 'match' needs a reference image")
        return self

    @property
    def sent_aspect_ratio(self) -> AspectRatio:
        """The ratio that the service is asked for."""
        return (
            (self.matched_ratio or "16:9") if self.aspect_ratio == "match" else self.aspect_ratio
        )

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the submit request."""
        optional = {
            "image_urls": self.image_urls or None,
            "promptUpsampling": self.prompt_upsampling,
            "enableTranslation": self.enable_translation,
            "safetyTolerance": self.safety_tolerance,
            "watermark": self.watermark,
        }
        body: dict[str, Any] = {
            "request_type": self.request_type,
            "provider": self.provider,
            "input": {
                "mode": self.mode,
                "prompt": self.prompt,
                "aspect_ratio": self.sent_aspect_ratio,
                "output_format": self.output_format,
                **{name: value for name, value in optional.items() if value is not None},
                **self.extra,
            },
        }
        if self.callback_url:
            body["callback_url"] = self.callback_url
        return body


class GenerationTask(BaseModel):
    """A task that the service accepted and bills. Its id is enough to wait for it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    task_id: str = Field(min_length=1)
    """The task's id at the service."""
    request: GenerationRequest | None = None
    """The request, if it is known."""
    submitted_at: datetime = Field(default_factory=utc_now)
    """When the task was accepted. Polling delays count from it."""
    ledger: str | None = None
    """The folder with the ledger that records the task: a URL, or `block:` and the reference of a
    saved Block."""
    key: str | None = None
    """The request's key in the ledger."""

    @field_validator("submitted_at")
    @classmethod
    def _assume_utc(cls, moment: datetime) -> datetime:
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class TaskStatus(_RedactedRepr):
    """The reply to a status request. Unknown states are kept."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    task_id: str
    state: str
    """`pending`, `processing`, `success`, `failed` or an unknown state, unchanged."""
    result_urls: list[str] = Field(default_factory=list)
    fail_code: str | None = None
    fail_message: str | None = None
    created_at: datetime | None = None
    completed_at: datetime | None = None
    generation_seconds: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the task has succeeded or failed."""
        return self.state in ("success", "failed")


class GenerationResult(_RedactedRepr):
    """The result of a successful task. Its URLs expire after days, so persist the images."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    task_id: str
    result_urls: list[str] = Field(min_length=1)
    """URLs of the images."""
    request: GenerationRequest | None = None
    submitted_at: datetime | None = None
    completed_at: datetime | None = None
    generation_seconds: float | None = None
    """Seconds of generation, as reported by the service."""
    base_url: str | None = None
    """Base URL of the service that reported the result. Downloads from its private network are
    allowed."""
    ledger: str | None = None
    """The folder with the ledger that records the task."""
    key: str | None = None
    """The request's key in the ledger."""

    def _repr_html_(self) -> str:
        """Show the reference and the result in a notebook, unless their URLs may be signed."""
        references = self.request.image_urls if self.request else []
        pictures = [("before", url) for url in references] + [
            ("after", u) for u in self.result_urls
        ]
        return _format_figures(
            f"Task {self.task_id}",
            [(caption, url) for caption, url in pictures if is_plain_url(url)],
        )


class StoredImage(BaseModel):
    """An image that was validated and stored completely."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    uri: str
    """Location, as an fsspec URL or a local path."""
    task_id: str
    format: OutputFormat | Literal["webp"]
    """Image format, detected from the content."""
    size: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the bytes, in hexadecimal."""
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""
    flags: list[str] = Field(default_factory=list)
    """What checks found, such as `blank`; see docs."""

    def _repr_html_(self) -> str:
        """Show a thumbnail in a notebook, if the image is on this machine."""
        text = f"{self.uri} ({self.width} x {self.height}, {self.size:,} bytes)"
        picture = read_as_data_url(self.uri)
        return _format_figures(text, [("", picture)] if picture else [])


def read_as_data_url(uri: str, pixels: int = _THUMBNAIL_PIXELS) -> str | None:
    """Return a thumbnail of a local image as a `data:` URL, or None without a readable image."""
    from PIL import Image  # noqa: PLC0415 - slow to import

    thumbnail = io.BytesIO()
    try:
        with Image.open(
            Path(uri.removeprefix("file://")), formats=("JPEG", "PNG", "WEBP")
        ) as image:
            image.thumbnail((pixels, pixels))
            image.save(thumbnail, "WEBP")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/webp;base64,{base64.b64encode(thumbnail.getvalue()).decode()}"


def _format_figures(title: str, pictures: Iterable[tuple[str, str]]) -> str:
    figures = "".join(
        f'<figure style="display: inline-block; margin: 4px"><img src="{html.escape(url)}" '
        f'style="max-height: {_THUMBNAIL_PIXELS}px"><figcaption>{html.escape(caption)}'
        "</figcaption></figure>"
        for caption, url in pictures
    )
    return f"<div>{html.escape(title)}<br>{figures}</div>"
