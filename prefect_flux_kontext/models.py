"""The nouns of the package: what is asked for, what is running, what came of it.

All are small pydantic models that survive JSON, so that a task id can be stored and waited
for later, by another flow on another machine.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from collections.abc import Iterable

Mode = Literal["pro", "max"]
AspectRatio = Literal["21:9", "16:9", "4:3", "1:1", "3:4", "9:16"]
OutputFormat = Literal["jpeg", "png"]
Provider = Literal["auto", "value", "official"]


def utc_now() -> datetime:
    """The present moment, with its time zone."""
    return datetime.now(UTC)


class _RedactedRepr(BaseModel):
    """A model whose repr leaves out what gives access: queries of URLs, and the callback URL."""

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            if name in ("image_urls", "result_urls"):
                yield name, [url.partition("?")[0] for url in value]
            elif name != "callback_url" or value is None:
                yield name, value


class GenerationRequest(_RedactedRepr):
    """One image to make: a prompt, and for style transfer the reference image.

    Limits and defaults are those of the service's reference page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(
        min_length=1, max_length=10_000, description="What to make, 1 to 10,000 characters."
    )
    image_urls: list[str] = Field(
        default_factory=list,
        description="Reference images as URLs that the service can fetch. None: text to image.",
    )
    mode: Mode = Field(
        default="pro", description="`pro`: higher quality, slower. `max`: balanced."
    )
    aspect_ratio: AspectRatio = Field(default="16:9", description="Width to height.")
    output_format: OutputFormat = Field(default="jpeg", description="Kind of the result.")
    provider: Provider = Field(default="auto", description="How the service routes the task.")
    callback_url: str | None = Field(
        default=None, description="Public HTTPS URL to be called when the task ends."
    )
    request_type: Literal["async", "callback"] = Field(
        default="async", description="`callback` follows from a `callback_url`."
    )
    prompt_upsampling: bool | None = Field(
        default=None, description="Let the service elaborate the prompt."
    )
    enable_translation: bool | None = Field(
        default=None, description="Let the service translate the prompt to English."
    )
    safety_tolerance: int | None = Field(
        default=None, ge=0, le=2, description="0 strict to 2 tolerant."
    )
    watermark: str | None = Field(default=None, description="Text to mark the image with.")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further input of the model, merged into the request as it is.",
    )

    @field_validator("extra")
    @classmethod
    def _extra_can_be_sent(cls, extra: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"extra is not JSON: {error}") from None
        return extra

    @model_validator(mode="before")
    @classmethod
    def _a_callback_url_means_callback(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("callback_url"):
            return {"request_type": "callback", **values}
        return values

    @model_validator(mode="after")
    def _callback_mode_and_url_go_together(self) -> Self:
        if (self.request_type == "callback") != (self.callback_url is not None):
            raise ValueError("request_type 'callback' and a callback_url go together")
        return self

    def body(self) -> dict[str, Any]:
        """The JSON body of the submit request."""
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
                "aspect_ratio": self.aspect_ratio,
                "output_format": self.output_format,
                **{name: value for name, value in optional.items() if value is not None},
                **self.extra,
            },
        }
        if self.callback_url:
            body["callback_url"] = self.callback_url
        return body


class GenerationTask(BaseModel):
    """A task the service has accepted, and bills. Its id is all that is needed to wait for it."""

    model_config = ConfigDict(frozen=True)

    task_id: str = Field(min_length=1, description="The service's name for the task.")
    request: GenerationRequest | None = Field(
        default=None, description="What was asked for, where it is known."
    )
    submitted_at: datetime = Field(
        default_factory=utc_now, description="When it was accepted; the first look counts from it."
    )

    @field_validator("submitted_at")
    @classmethod
    def _without_a_time_zone_it_is_utc(cls, moment: datetime) -> datetime:
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class TaskStatus(_RedactedRepr):
    """One answer to a status request, read tolerantly."""

    model_config = ConfigDict(frozen=True)

    task_id: str
    state: str = Field(
        description="`pending`, `processing`, `success`, `failed`, or what the service says."
    )
    result_urls: list[str] = Field(default_factory=list)
    fail_code: str | None = None
    fail_message: str | None = None
    created_at: datetime | None = None
    completed_at: datetime | None = None
    generation_seconds: float | None = None


class GenerationResult(_RedactedRepr):
    """A task that ended well. Its URLs live for days only: persist them."""

    model_config = ConfigDict(frozen=True)

    task_id: str
    result_urls: list[str] = Field(min_length=1, description="Where the images can be fetched.")
    request: GenerationRequest | None = None
    submitted_at: datetime | None = None
    completed_at: datetime | None = None
    generation_seconds: float | None = Field(
        default=None, description="Seconds the service spent, by its own count."
    )
    base_url: str | None = Field(
        default=None, description="The service that told it, whose private network may serve it."
    )


class StoredImage(BaseModel):
    """An image that was checked and is whole in its place."""

    model_config = ConfigDict(frozen=True)

    uri: str = Field(description="Where it is, as an fsspec URL or a local path.")
    task_id: str
    format: OutputFormat | Literal["webp"] = Field(description="By its content, not its name.")
    size: int = Field(description="Bytes.")
    sha256: str = Field(description="Checksum of the bytes, in hexadecimal.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
