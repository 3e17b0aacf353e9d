"""The API key is sent to the base URL and appears nowhere else."""

import asyncio
import logging
import pickle
import traceback

import pytest
from pydantic import SecretStr

from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.errors import ConfigurationError, FluxKontextError
from prefect_flux_kontext.models import GenerationTask
from tests.support.clients import KEY, REQUEST, make_client
from tests.support.scripted_server import (
    ScriptedServer,
    accepted,
    envelope,
    half_a_reply,
    hang_up,
    html,
    redirect,
    reply,
    reset,
    silence,
)

pytestmark = pytest.mark.anyio

BEARER = f"Bearer {KEY}"


def render(error):
    """Return everything of an error that may be shown, stored or sent."""
    chain = []
    while error is not None:
        chain += [str(error), repr(error), repr(error.args), repr(vars(error))]
        chain += [repr(pickle.dumps(error)), "".join(traceback.format_exception(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(chain)


PLAYS = {
    "reset": reset,
    "hung up": hang_up,
    "silence": silence,
    "half a reply": half_a_reply(),
    "echo in a refusal": envelope(401, {"error": f"unknown: {BEARER}"}, f"bad {KEY}", status=401),
    "echo in an envelope": envelope(400, {"error": BEARER}, BEARER),
    "echo in another type": envelope(400, {"error": {"headers": [BEARER]}}, [KEY]),
    "echo in JSON escapes": reply(
        400, b'{"message": "' + b"".join(b"\\u%04x" % ord(c) for c in KEY).lower() + b'"}'
    ),
    "echo in HTML": html(502, f"<pre>{BEARER}</pre>"),
    "echo in HTML with 200": html(200, f"<pre>{BEARER}</pre>"),
    "echo cut by a short glimpse": html(500, "x" * 70 + KEY),
    "echo cut by a long message": envelope(400, None, "x" * 490 + KEY),
    "echo in place of a state": envelope(data={"taskId": BEARER}),
    "echo in the wrong place": envelope(data={"token": KEY}),
    "echo in a broken head": reply(headers=BEARER, status=f"2 {BEARER}"),
    "echo in Retry-After": envelope(403, None, "no", status=403, retry_after=BEARER),
    "echo in Location": redirect(f"/{KEY}"),
    "a 5xx": html(503, "busy"),
}


@pytest.mark.parametrize("call", ["submit", "status", "balance"])
@pytest.mark.parametrize("what", PLAYS)
async def test_key_is_in_no_error_and_no_log(what, call, caplog):
    for name in ("prefect_flux_kontext", "httpx"):
        caplog.set_level(logging.DEBUG, name)
    error = None
    async with (
        ScriptedServer(PLAYS[what]) as server,
        make_client(server.url, read=0.1) as client,
    ):
        try:
            if call == "submit":
                task_id = (await client.submit(REQUEST)).task_id
                assert what == "echo in place of a state"
                assert task_id == BEARER
                return
            await (client.status("task_1") if call == "status" else client.balance())
        except FluxKontextError as caught:
            error = caught
        else:
            pytest.fail("no error was raised")
        assert KEY not in repr(client) + str(client)
        assert server.seen[0].headers["authorization"] == BEARER
    assert KEY not in render(error)
    assert KEY[:8] not in render(error), "the error contains a part of the key"
    assert KEY[:8] not in caplog.text


async def test_libraries_do_not_log_request_headers(caplog):
    for name in ("prefect_flux_kontext", "httpx", "aiohttp", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    asyncio.get_running_loop().set_debug(True)
    async with ScriptedServer(accepted()) as server, make_client(server.url) as client:
        await client.submit(REQUEST)
    port = server.url.rpartition(":")[2]
    assert f"raddr=('127.0.0.1', {port})> connected" in caplog.text
    assert KEY not in caplog.text


async def test_failed_task_error_does_not_contain_the_key():
    play = envelope(data={"state": "failed", "failCode": KEY, "failMsg": f"sent {BEARER}"})
    async with ScriptedServer(play) as server, make_client(server.url) as client:
        with pytest.raises(FluxKontextError) as caught:
            await wait_until_ended(
                client, GenerationTask(task_id="task_1"), PollingCadence(initial_delay=0)
            )
    assert KEY not in render(caught.value)
    assert caught.value.message == "Task task_1 failed: ***: sent Bearer ***"


async def test_refused_connection_error_does_not_contain_the_key():
    async with make_client("http://127.0.0.1:1") as client:
        with pytest.raises(FluxKontextError) as caught:
            await client.status("task_1")
    assert KEY not in render(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("call", ["submit", "status"])
async def test_redirect_is_not_followed(status, call):
    async with ScriptedServer(accepted()) as elsewhere:
        play = redirect(elsewhere.url + "/api/v1/generateTask/flux-kontext", status)
        async with ScriptedServer(play) as server, make_client(server.url) as client:
            with pytest.raises(FluxKontextError):
                await (client.submit(REQUEST) if call == "submit" else client.status("task_1"))
            assert len(server.seen) == 1
        assert elsewhere.connections == 0


async def test_environment_proxy_never_sees_the_key(monkeypatch):
    async with ScriptedServer(html(502)) as proxy, ScriptedServer(accepted()) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with make_client(server.url) as client:
            await client.submit(REQUEST)
        assert (proxy.connections, len(server.seen)) == (0, 1)
        # For https the client asks the proxy for a tunnel, which needs no key.
        async with make_client("https://service.invalid") as client:
            with pytest.raises(FluxKontextError) as caught:
                await client.status("task_1")
        assert caught.value.not_accepted
        assert {seen.method for seen in proxy.seen} == {"CONNECT"}
        assert KEY not in repr(proxy.seen)


@pytest.mark.parametrize("key", ["", "  ", "two words", "käse", "a\nb", "a\x00b", "\u200bkey"])
def test_invalid_key_is_rejected_without_showing_it(key):
    with pytest.raises(ConfigurationError) as caught:
        FluxKontextClient(key)
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize("key", [f" {KEY}\n", BEARER, f"bearer  {KEY} "])
async def test_key_may_have_white_space_around_it_and_bearer_before_it(key):
    async with ScriptedServer(accepted()) as server:
        async with FluxKontextClient(SecretStr(key), base_url=server.url) as client:
            await client.submit(REQUEST)
        assert server.seen[0].headers["authorization"] == BEARER
    assert KEY not in repr(client)


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "service.test",
        "//service.test",
        "ftp://service.test",
        "http://",
        "http://user:pw@a.test",
        "http://a.test/?q=1",
        "http://a.test/#x",
        "http://a.test:port",
        "http://a\n.b",
        "http://a.test/api",
        "http://a.test/v1",
        "http://a.test/api/v2",
        "http://a.test/api/v1/other",
    ],
)
def test_invalid_base_url_is_rejected(base_url):
    with pytest.raises(ConfigurationError, match="base URL"):
        FluxKontextClient(KEY, base_url=base_url)


@pytest.mark.parametrize(
    "base_url",
    [
        "http://a.test",
        " http://a.test/\n",
        "http://a.test/api/v1",
        "http://a.test/api/v1/ ",
        "http://a.test/api/v1/generateTask/flux-kontext",
    ],
)
def test_path_of_the_service_is_removed_from_the_base_url(base_url):
    assert FluxKontextClient(KEY, base_url=base_url).base_url == "http://a.test"


async def test_closed_client_can_be_closed_again_and_sends_nothing():
    async with ScriptedServer(accepted()) as server:
        client = make_client(server.url)
        await client.aclose()
        await client.aclose()
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="closed"):
            await client.submit(REQUEST)
        assert client.limiter.tasks.running == 0
        assert server.seen == []


@pytest.mark.parametrize(
    ("host", "is_private"),
    [
        ("127.0.0.1", True),
        ("localhost:8765", True),
        ("10.1.2.3", True),
        ("192.168.0.1:80", True),
        ("[::1]:80", True),
        ("[fd00::1]", True),
        ("sandbox:8765", True),
        ("flux.internal", True),
        ("nas.local", True),
        ("api.localhost", True),
        ("api.intranet", True),
        ("[::ffff:10.0.0.1]", True),
        ("[::ffff:8.8.8.8]", False),
        ("api.apixo.ai", False),
        ("8.8.8.8", False),
        ("[2606:4700::1111]", False),
        ("172.32.0.1", False),
        ("localhost.example.com", False),
    ],
)
def test_http_is_only_for_private_hosts(host, is_private):
    assert FluxKontextClient(KEY, base_url=f"https://{host}").base_url == f"https://{host}"
    if is_private:
        assert FluxKontextClient(KEY, base_url=f"http://{host}").base_url == f"http://{host}"
        return
    with pytest.raises(ConfigurationError, match="would send the API key unencrypted"):
        FluxKontextClient(KEY, base_url=f"http://{host}")
