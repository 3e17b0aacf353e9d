import pytest

from tests.sandbox.helpers import STATUS, SUBMIT, sandbox_client

pytestmark = pytest.mark.anyio

GOOD = {"mode": "pro", "prompt": "a cat"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": "text"}, "input"),
        ({"input": {"prompt": "a"}}, "input.mode"),
        ({"input": {**GOOD, "mode": "mini"}}, "input.mode"),
        ({"input": {"mode": "pro"}}, "input.prompt"),
        ({"input": {**GOOD, "prompt": ""}}, "input.prompt"),
        ({"input": {**GOOD, "prompt": "a" * 10_001}}, "input.prompt"),
        ({"input": {**GOOD, "prompt": 7}}, "input.prompt"),
        ({"input": {**GOOD, "image_urls": "http://127.0.0.1/a.jpg"}}, "input.image_urls"),
        ({"input": {**GOOD, "image_urls": ["http://a", "http://b"]}}, "input.image_urls"),
        ({"input": {**GOOD, "aspect_ratio": "match"}}, "input.aspect_ratio"),
        ({"input": {**GOOD, "image_urls": [1]}}, "input.image_urls.0"),
        ({"input": {**GOOD, "aspect_ratio": "2:1"}}, "input.aspect_ratio"),
        ({"input": {**GOOD, "output_format": "jpg"}}, "input.output_format"),
        ({"input": {**GOOD, "promptUpsampling": "yes"}}, "input.promptUpsampling"),
        ({"input": {**GOOD, "enableTranslation": 1}}, "input.enableTranslation"),
        ({"input": {**GOOD, "safetyTolerance": 3}}, "input.safetyTolerance"),
        ({"input": {**GOOD, "safetyTolerance": "2"}}, "input.safetyTolerance"),
        ({"input": {**GOOD, "watermark": 1}}, "input.watermark"),
        ({"input": GOOD, "provider": "best"}, "provider"),
        ({"input": GOOD, "request_type": "sync"}, "request_type"),
        ({"input": GOOD, "request_type": "callback"}, "callback_url"),
        (
            {"input": GOOD, "request_type": "callback", "callback_url": "ftp://127.0.0.1/"},
            "callback_url",
        ),
        (["input"], "the body"),
    ],
)
async def test_a_bad_body_is_refused_and_the_field_named(body, field):
    async with sandbox_client() as sandbox:
        reply = await sandbox.http.post(SUBMIT, json=body)
        assert (reply.status_code, reply.json()["code"]) == (400, 400)
        assert reply.json()["data"]["error"].startswith(field)
        assert (await sandbox.bill())["accepted"] == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_not_json_is_refused(content):
    async with sandbox_client() as sandbox:
        reply = await sandbox.http.post(SUBMIT, content=content)
        assert reply.json()["code"] == 400


async def test_all_contract_and_unknown_fields_are_accepted():
    body = {
        "request_type": "callback",
        "callback_url": "http://127.0.0.1:1/token",
        "provider": "official",
        "input": {
            "mode": "max",
            "prompt": "a" * 10_000,
            "image_urls": [],
            "aspect_ratio": "9:16",
            "output_format": "png",
            "promptUpsampling": True,
            "enableTranslation": False,
            "safetyTolerance": 0,
            "watermark": "ours",
            "invented_tomorrow": {"deep": [1]},
        },
    }
    async with sandbox_client() as sandbox:
        reply = await sandbox.http.post(SUBMIT, json=body)
        assert reply.json()["message"] == "success"
        assert reply.json()["data"]["taskId"].startswith("task_")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "a-key"], ids=repr)
@pytest.mark.parametrize("path", [STATUS + "?taskId=task_1", "/api/v1/apikeys/current-balance"])
async def test_a_missing_or_malformed_key_is_refused(header, path):
    async with sandbox_client() as sandbox:
        del sandbox.http.headers["Authorization"]
        headers = {} if header is None else {"Authorization": header}
        reply = await sandbox.http.get(path, headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (401, 401)


async def test_only_the_configured_key_is_let_in():
    async with sandbox_client(api_key="the-key") as sandbox:
        assert (await sandbox.submit(key="another")).status_code == 401
        assert (await sandbox.submit(key="the-key")).status_code == 200


@pytest.mark.parametrize("path", ["/nowhere", "/api/v1/generateTask/other-model", SUBMIT + "/x"])
async def test_an_unknown_path_or_model_is_not_found(path):
    async with sandbox_client() as sandbox:
        reply = await sandbox.http.post(path, json={"input": GOOD})
        assert (reply.status_code, reply.json()["code"]) == (404, 404)


async def test_unknown_task_is_404_and_missing_task_id_400():
    async with sandbox_client() as sandbox:
        assert (await sandbox.status("task_nobody")).status_code == 404
        assert (await sandbox.http.get(STATUS)).status_code == 400


async def test_a_task_of_another_key_is_not_found():
    async with sandbox_client() as sandbox:
        task_id = await sandbox.accepted(key="mine")
        assert (await sandbox.status(task_id, key="mine")).status_code == 200
        assert (await sandbox.status(task_id, key="yours")).status_code == 404
