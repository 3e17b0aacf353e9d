"""The models: which values they accept, and that they survive JSON."""

import json
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from prefect_flux_kontext.manifest.row import Row
from prefect_flux_kontext.models import (
    GenerationRequest,
    GenerationResult,
    GenerationTask,
    StoredImage,
    TaskStatus,
)


def test_defaults_match_the_contract():
    assert GenerationRequest(prompt="a").body() == {
        "request_type": "async",
        "provider": "auto",
        "input": {
            "mode": "pro",
            "prompt": "a",
            "aspect_ratio": "16:9",
            "output_format": "jpeg",
        },
    }


def test_callback_url_sets_request_type():
    body = GenerationRequest(prompt="a", callback_url="https://hooks.test/1").body()
    assert (body["request_type"], body["callback_url"]) == ("callback", "https://hooks.test/1")


def test_extra_input_is_merged_unchanged():
    body = GenerationRequest(prompt="a", extra={"seed": 7, "nested": {"a": None}}).body()
    assert body["input"]["seed"] == 7
    assert body["input"]["nested"] == {"a": None}


@pytest.mark.parametrize("name", ["prompt_upsampling", "enable_translation", "safety_tolerance"])
def test_option_that_is_off_is_sent_and_unset_is_not(name):
    field = {
        "prompt_upsampling": "promptUpsampling",
        "enable_translation": "enableTranslation",
        "safety_tolerance": "safetyTolerance",
    }[name]
    assert field not in GenerationRequest(prompt="a").body()["input"]
    assert GenerationRequest(prompt="a", **{name: 0}).body()["input"][field] == 0


@pytest.mark.parametrize("prompt", ["a", "a" * 10_000, "\N{SUNRISE}" * 10_000, " "])
def test_prompt_has_1_to_10_000_characters(prompt):
    assert GenerationRequest(prompt=prompt).body()["input"]["prompt"] == prompt


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": ""},
        {"prompt": "a" * 10_001},
        {"prompt": None},
        {"prompt": "\ud800"},
        {"prompt": "a", "mode": "ultra"},
        {"prompt": "a", "aspect_ratio": "2:1"},
        {"prompt": "a", "output_format": "webp"},
        {"prompt": "a", "provider": "cheap"},
        {"prompt": "a", "safety_tolerance": 3},
        {"prompt": "a", "safety_tolerance": -1},
        {"prompt": "a", "image_urls": "https://photos.test/1.jpg"},
        {"prompt": "a", "image_urls": ["https://a.test/1", "https://a.test/2"]},
        {"prompt": "a", "aspect_ratio": "match"},
        {"prompt": "a", "request_type": "callback"},
        {"prompt": "a", "request_type": "async", "callback_url": "https://hooks.test/1"},
        {"prompt": "a", "callback_url": ""},
        {"prompt": "a", "promt": "b"},
        {"prompt": "a", "extra": {"a": float("nan")}},
        {"prompt": "a", "extra": {"a": float("inf")}},
        {"prompt": "a", "extra": {"a": {1, 2}}},
        {"prompt": "a", "extra": {"a": datetime(2026, 1, 1, tzinfo=UTC)}},
        {"prompt": "a", "extra": {"a": "\ud800"}},
    ],
)
def test_invalid_request_is_rejected(fields):
    with pytest.raises(ValidationError):
        GenerationRequest(**fields)


REQUEST = GenerationRequest(prompt="a", callback_url="https://hooks.test/1", extra={"b": [1]})


@pytest.mark.parametrize(
    "model",
    [
        REQUEST,
        GenerationTask(task_id="task_1", request=REQUEST),
        GenerationTask(task_id="task_1"),
        TaskStatus(task_id="task_1", state="queued"),
        GenerationResult(task_id="task_1", result_urls=["https://r.test/1"], request=REQUEST),
        StoredImage(
            uri="out/1.png", task_id="t", format="png", size=1, sha256="0", width=2, height=3
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_model_survives_json(model):
    assert type(model).model_validate_json(model.model_dump_json()) == model


def test_request_with_several_references_is_still_read_from_a_ledger():
    urls = ["https://a.test/1", "https://a.test/2"]
    text = json.dumps({"prompt": "a", "image_urls": urls, "aspect_ratio": "16:9"})
    assert GenerationRequest.model_validate_json(text).image_urls == urls


@pytest.mark.parametrize(
    ("fields", "ratio", "sent"),
    [
        ({}, "16:9", "16:9"),
        ({"image_urls": ["https://a.test/1"]}, "match", "16:9"),
        ({"image_urls": ["https://a.test/1"], "aspect_ratio": None}, "match", "16:9"),
        ({"image_urls": ["https://a.test/1"], "matched_ratio": "3:4"}, "match", "3:4"),
        ({"image_urls": ["https://a.test/1"], "aspect_ratio": "1:1"}, "1:1", "1:1"),
    ],
)
def test_match_is_the_default_ratio_with_a_reference(fields, ratio, sent):
    request = GenerationRequest(prompt="a", **fields)
    assert (request.aspect_ratio, request.sent_aspect_ratio) == (ratio, sent)
    assert request.body()["input"]["aspect_ratio"] == sent


def test_task_needs_only_a_task_id():
    task = GenerationTask(task_id="task_1")
    assert task.request is None
    assert abs((datetime.now(UTC) - task.submitted_at).total_seconds()) < 60


def test_submit_time_without_time_zone_is_utc():
    task = GenerationTask.model_validate({"task_id": "t", "submitted_at": "2026-01-01T12:00:00"})
    assert task.submitted_at == datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_result_needs_a_url():
    with pytest.raises(ValidationError):
        GenerationResult(task_id="task_1", result_urls=[])


def test_repr_contains_no_secrets():
    request = GenerationRequest(
        prompt="oil",
        image_urls=["https://a.test/cat.png?X-Amz-Signature=canary"],
        callback_url="https://hooks.test/canary",
    )
    result = GenerationResult(
        task_id="task_1", result_urls=["https://cdn.test/1.png?sig=canary"], request=request
    )
    row = Row("a", 2, request, "key", "a", cells={"image": "https://a.test/?canary"})
    text = f"{request!r} {request} {result!r} {result} {row!r} {row}"
    assert "canary" not in text
    for shown in ("https://a.test/cat.png'", "https://cdn.test/1.png"):
        assert shown in text
