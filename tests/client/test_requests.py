"""The requests that are sent: submit, balance and the check of an account."""

import asyncio

import pytest

from prefect_flux_kontext.models import GenerationRequest
from tests.support.clients import KEY, REQUEST, make_client
from tests.support.scripted_server import (
    ScriptedServer,
    accepted,
    envelope,
)

pytestmark = pytest.mark.anyio


async def test_submit_sends_the_complete_request():
    request = GenerationRequest(
        prompt="ein Leuchtturm bei Dämmerung \N{SUNRISE}",
        image_urls=["https://photos.test/1.jpg"],
        mode="max",
        aspect_ratio="21:9",
        output_format="png",
        provider="official",
        callback_url="https://hooks.test/token",
        prompt_upsampling=True,
        enable_translation=False,
        safety_tolerance=0,
        watermark="ours",
        extra={"newThing": {"a": [1, None]}},
    )
    async with ScriptedServer(accepted()) as server, make_client(server.url + "/") as client:
        await client.submit(request)
    (seen,) = server.seen
    assert (seen.method, seen.target) == ("POST", "/api/v1/generateTask/flux-kontext")
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["accept-encoding"] == "identity"
    assert seen.json() == {
        "request_type": "callback",
        "callback_url": "https://hooks.test/token",
        "provider": "official",
        "input": {
            "mode": "max",
            "prompt": "ein Leuchtturm bei Dämmerung \N{SUNRISE}",
            "image_urls": ["https://photos.test/1.jpg"],
            "aspect_ratio": "21:9",
            "output_format": "png",
            "promptUpsampling": True,
            "enableTranslation": False,
            "safetyTolerance": 0,
            "watermark": "ours",
            "newThing": {"a": [1, None]},
        },
    }


async def test_base_url_may_have_the_path_of_the_service():
    async with (
        ScriptedServer(accepted()) as server,
        make_client(server.url + "/api/v1/") as client,
    ):
        await client.submit(REQUEST)
    assert server.seen[0].target == "/api/v1/generateTask/flux-kontext"


async def test_balance_and_check_request_only_the_balance():
    async with (
        ScriptedServer(envelope(data={"balance": "12.5"})) as server,
        make_client(server.url) as client,
    ):
        assert await client.balance() == 12.5
        assert await client.check() == 12.5
    assert {(seen.method, seen.target) for seen in server.seen} == {
        ("GET", "/api/v1/apikeys/current-balance")
    }


def test_client_of_another_event_loop_sends_nothing():
    async def serve_two_loops():
        async with ScriptedServer(accepted()) as server:
            client = make_client(server.url)
            await client.submit(REQUEST)

            def submit_again():
                asyncio.run(client.submit(REQUEST))

            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(submit_again)
            await client.aclose()
            return len(server.seen)

    assert asyncio.run(serve_two_loops()) == 1
