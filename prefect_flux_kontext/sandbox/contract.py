"""The wire format: the submit body, the envelopes and the refusals.

Written from the service's contract alone, not from the client in this package.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

MODEL = "flux-kontext"

JsonObject = dict[str, Any]

_HTTP_URL = TypeAdapter(AnyHttpUrl)


class Refusal(Exception):  # noqa: N818 - an answer, not an error of the sandbox
    """A refused request, answered with `code` as HTTP status and in an error envelope.

    `error` is the envelope's `data.error`, `retry_after` the header's whole seconds, if any.
    """

    def __init__(
        self, code: int, message: str, error: str, *, retry_after: int | None = None
    ) -> None:
        super().__init__(f"{code} {message}: {error}")
        self.code = code
        self.message = message
        self.error = error
        self.retry_after = retry_after


class _Wire(BaseModel):
    # Strict, because a client that sends "2" for 2 should fail here, for $0. Unknown fields
    # are accepted, because the service may add fields.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class GenerationInput(_Wire):
    """The `input` of a submit body."""

    mode: Literal["pro", "max"]
    prompt: Annotated[str, Field(min_length=1, max_length=10_000)]
    image_urls: Annotated[list[str], Field(max_length=1)] = []
    aspect_ratio: Literal["21:9", "16:9", "4:3", "1:1", "3:4", "9:16"] = "16:9"
    output_format: Literal["jpeg", "png"] = "jpeg"
    prompt_upsampling: bool = Field(default=False, alias="promptUpsampling")
    enable_translation: bool = Field(default=True, alias="enableTranslation")
    safety_tolerance: Annotated[int, Field(ge=0, le=2)] = Field(default=2, alias="safetyTolerance")
    watermark: str | None = None


class Submission(_Wire):
    """A submit body."""

    request_type: Literal["async", "callback"] = "async"
    callback_url: str | None = None
    provider: Literal["auto", "value", "official"] = "auto"
    input: GenerationInput

    @model_validator(mode="after")
    def _require_callback_url(self) -> Submission:
        if self.request_type == "callback":
            if self.callback_url is None:
                raise ValueError("callback_url is required when request_type is callback")
            # The real service requires HTTPS. A receiver on loopback has no certificate.
            try:
                _HTTP_URL.validate_python(self.callback_url)
            except ValidationError:
                raise ValueError("callback_url must be an http or https URL") from None
        return self


def read_submission(payload: object) -> Submission:
    """Validate a submit body, or raise a Refusal (400) that names the invalid field."""
    if not isinstance(payload, dict):
        raise Refusal(400, "invalid parameters", "the body must be a JSON object")
    try:
        return Submission.model_validate(payload)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ")
        error = f"{field}: {text}" if field else text
        raise Refusal(400, "invalid parameters", error) from None


def success(data: JsonObject | float | None) -> JsonObject:
    """Make the envelope of a successful request."""
    return {"code": 200, "message": "success", "data": data}


def failure(refusal: Refusal) -> JsonObject:
    """Make the envelope of a refused request."""
    return {"code": refusal.code, "message": refusal.message, "data": {"error": refusal.error}}
