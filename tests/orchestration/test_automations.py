"""Announcements of manifests, and notifications through a real server and webhook."""

import http.server
import json
import queue
import threading

import anyio
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.orchestration import events
from prefect_flux_kontext.orchestration.automations import create_automations
from tests.orchestration.conftest import QUICK, flush_to_prefect
from tests.orchestration.records import post

pytestmark = pytest.mark.anyio

MANIFEST = "https://shop.example.com/new.csv"


class TestAnnouncement:
    async def wait_for_announcement(self, manifest):
        """Wait until the server has announcements of a manifest, and return them."""
        await anyio.to_thread.run_sync(flush_to_prefect)
        wanted = {"event": {"name": [events.MANIFEST_ARRIVED]}}
        for _ in range(300):
            page = await post("/events/filter", {"filter": wanted, "limit": 50})
            found = [e for e in page["events"] if e["payload"]["manifest"] == manifest]
            if found:
                return found
            await anyio.sleep(0.1)
        raise AssertionError("the announcement did not arrive")

    async def test_flow_announces_a_manifest_with_further_values(self):
        url = f"{MANIFEST}?version=3"
        events.emit_manifest_arrived(url, output="s3://shop/restyled", season="summer")
        (event,) = await self.wait_for_announcement(url)
        payload = {"manifest": url, "output": "s3://shop/restyled", "season": "summer"}
        assert event["payload"] == payload
        assert event["resource"]["flux-kontext.output"] == "s3://shop/restyled"

    async def test_command_announces_absolute_paths(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        arguments = ["announce", "new.csv", "--output", "out", "--with", "season=summer"]
        assert await anyio.to_thread.run_sync(main, arguments) == 0
        (event,) = await self.wait_for_announcement(str(tmp_path / "new.csv"))
        assert event["payload"]["output"] == str(tmp_path / "out")
        assert event["payload"]["season"] == "summer"
        assert "Announced" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "url",
        [
            f"{MANIFEST}?X-Amz-Signature=abc&X-Amz-Expires=60",
            f"{MANIFEST}?sig=abc&se=2026",
            "https://me:secret@shop.example.com/new.csv",
        ],
    )
    def test_url_with_a_secret_is_not_announced(self, url):
        with pytest.raises(ConfigurationError, match="signature or a password") as caught:
            events.emit_manifest_arrived(url, output="out")
        assert "abc" not in str(caught.value)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("api", [None, "http://127.0.0.1:1/api"])
    def test_undelivered_announcement_exits_with_2(self, api, capsys):
        with temporary_settings({PREFECT_API_URL: api}):
            assert main(["announce", MANIFEST, "--output", "out"]) == 2
        error = capsys.readouterr().err
        assert "PREFECT_API_URL" in error or "127.0.0.1:1" in error


@pytest.fixture
def webhook():
    """The address of a webhook, and the queue of the notifications that it receives."""
    received = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.put(json.loads(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", received
        finally:
            server.shutdown()
            thread.join()


class TestNotifications:
    async def test_failure_spending_and_expiry_are_notified(self, webhook, account, tmp_path):
        url, received = webhook
        block = CustomWebhookNotificationBlock(
            name="alerts", url=url, json_data={"subject": "{{subject}}", "body": "{{body}}"}
        )
        await block.asave("alerts", overwrite=True)
        names = await create_automations("custom-webhook/alerts")
        assert len(names) == 3
        assert await create_automations("custom-webhook/alerts") == names
        known = await post("/automations/filter", {})
        assert sum(automation["name"] in names for automation in known) == 3

        state = await style_transfer_batch(
            [{"id": f"row-{n}", "prompt": f"a lighthouse {n}"} for n in range(3)],
            str(tmp_path),
            credentials=account,
            cadence=QUICK,
            budget_usd=0.07,
            alert_above_usd=0.05,
            return_state=True,
        )
        assert state.is_failed()
        expiring = {"output": "out", "rows": 7, "days_left": 1.5, "task_id": "task_1"}
        events.emit(events.RESULTS_EXPIRING, "out", expiring)
        await anyio.to_thread.run_sync(flush_to_prefect)
        # The server waits some seconds for related events before it runs an automation.
        notes = [
            await anyio.to_thread.run_sync(lambda: received.get(timeout=90)) for _ in range(3)
        ]
        text = "\n".join(f"{note['subject']}\n{note['body']}" for note in notes)
        assert "style-transfer-batch is Failed" in text
        assert "$0.06 spent" in text
        assert "more than $0.05." in text
        assert "7 results expire soon" in text
        assert "flux-kontext collect out" in text

    @pytest.mark.parametrize("block", ["custom-webhook/missing", "missing"])
    async def test_missing_block_is_named(self, block):
        with pytest.raises(ConfigurationError, match=block):
            await create_automations(block)

    async def test_block_that_cannot_notify_is_refused(self, account):
        await account.asave("no-notifier", overwrite=True)
        with pytest.raises(ConfigurationError, match="cannot send notifications"):
            await create_automations("flux-kontext-credentials/no-notifier")
