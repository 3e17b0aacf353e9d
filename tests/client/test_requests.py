"""The requests that are sent: submit, balance and the check of an account."""

import socket

import pytest

from prefect_flux_kontext.errors import (
    ConfigurationError,
    NotConnectedError,
    RefusedError,
)
from prefect_flux_kontext.models import GenerationRequest
from tests.support.clients import KEY, REQUEST, make_client
from tests.support.scripted_server import (
    ScriptedServer,
    accepted,
    envelope,
    html,
    reply,
    reset,
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


async def test_request_with_several_references_is_not_sent():
    request = GenerationRequest(prompt="oil", image_urls=["https://a.test/1", "https://a.test/2"])
    async with ScriptedServer(accepted()) as server, make_client(server.url) as client:
        with pytest.raises(ConfigurationError, match="2 reference images"):
            await client.submit(request)
    assert server.seen == []


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


@pytest.mark.parametrize("play", [envelope(404, status=404), html(502), reset, reply(200, b"?")])
async def test_check_passes_without_a_balance(play):
    async with ScriptedServer(play) as server, make_client(server.url) as client:
        assert await client.check() is None


async def test_check_raises_for_a_wrong_key_or_no_connection():
    play = envelope(401, status=401)
    async with ScriptedServer(play) as server, make_client(server.url) as client:
        with pytest.raises(RefusedError):
            await client.check()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with make_client(f"http://127.0.0.1:{bound.getsockname()[1]}") as client:
            with pytest.raises(NotConnectedError):
                await client.check()
