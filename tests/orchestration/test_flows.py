"""The flow of a batch: what it stores and counts, and that JSON parameters suffice."""

import csv
import json
import socket

import anyio
import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr

from prefect_flux_kontext import FluxKontextCredentials
from prefect_flux_kontext.errors import (
    ConfigurationError,
    FluxKontextError,
    ManifestError,
    NotConnectedError,
    UnauthorizedError,
)
from prefect_flux_kontext.flows import (
    collect_batch,
    retry_failed,
    style_transfer,
    style_transfer_batch,
)
from prefect_flux_kontext.images.decode import inspect_image
from tests.orchestration.conftest import QUICK, flush_to_prefect

pytestmark = pytest.mark.anyio

CADENCE = QUICK.model_dump()

UNREACHABLE = "http://127.0.0.1:1"


def write_manifest(path, rows, columns=("id", "image", "prompt")):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(path)


async def wait_for_task_runs(flow_run_id, expected):
    """Wait until the server has the expected task runs of a flow run, and return them."""
    await anyio.to_thread.run_sync(flush_to_prefect)
    async with get_client() as client:
        for _ in range(1_200):
            runs = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            )
            if len(runs) >= expected and all(run.state.is_final() for run in runs):
                return runs
            await anyio.sleep(0.1)
    return runs


class TestBatch:
    async def test_callbacks_use_the_secret_of_the_block(
        self, account, sandbox, tmp_path, monkeypatch
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_LISTEN", address)
        with_secret = account.model_copy(
            update={"callback_secret": SecretStr("a-secret-of-the-tests-0123456789")}
        )
        summary = await style_transfer_batch(
            [{"id": "a", "prompt": "a lighthouse"}],
            str(tmp_path),
            credentials=with_secret,
            cadence=CADENCE,
            callback_url=f"http://{address}/hooks",
        )
        assert summary.stored == 1
        (record,) = sandbox.service.records()
        assert record["callback_url"].startswith(f"http://{address}/hooks/")

    async def test_failed_rows_do_not_stop_the_others(self, account, sandbox, reference, tmp_path):
        output = tmp_path / "out"
        manifest = write_manifest(
            tmp_path / "m.csv",
            [
                ("cat", reference, "oil", ""),
                ("dog", reference, "", "max"),
                ("bird", "", "a bird on a wire", ""),
                ("wrong", reference, "oil", "turbo"),
                ("rude", reference, "nsfw", ""),
                ("lost", f"{sandbox.url}/references/none.jpg", "oil", ""),
            ],
            ("id", "image", "prompt", "mode"),
        )
        state = await style_transfer_batch(
            manifest,
            str(output),
            credentials=account,
            prompt="as a poster",
            skip_invalid=True,
            cadence=CADENCE,
            return_state=True,
        )
        summary = await state.aresult()
        assert (summary.rows, summary.stored, summary.failed) == (6, 3, 3)
        assert summary.not_submitted == 0
        assert summary.reasons == {
            "refused": 1,
            "CONTENT_VIOLATION": 1,
            "INVALID_IMAGE_URL": 1,
        }
        failures = {row.id: row for row in summary.failures}
        assert {row.id: row.line for row in summary.failures} == {"wrong": 5, "rude": 6, "lost": 7}
        assert "mode 'turbo'" in failures["wrong"].message
        assert failures["wrong"].task_id is None
        assert failures["rude"].task_id in failures["rude"].message
        for word in ("3 of 6 rows stored", "3 failed", "CONTENT_VIOLATION 1"):
            assert word in str(summary)
        images = {path.name for path in output.iterdir() if path.suffix == ".jpg"}
        assert images == {"cat.jpg", "dog.jpg", "bird.jpg"}
        for name in images:
            assert inspect_image((output / name).read_bytes()).format == "jpeg"
        bill = sandbox.service.bill()
        assert bill["by_mode"] == {"pro": 4, "max": 1}
        runs = await wait_for_task_runs(state.state_details.flow_run_id, expected=1)
        assert [run.name for run in runs] == ["wave-1"]
        lines = list(map(json.loads, (output / "results.jsonl").read_text().splitlines()))
        assert len(lines) == 6
        assert {line["flow_run_id"] for line in lines} == {str(state.state_details.flow_run_id)}

    async def test_three_hundred_rows_run_in_two_overlapping_waves(
        self, account, sandbox, tmp_path
    ):
        rows = [(f"row-{number}", "", f"a lighthouse, number {number}") for number in range(300)]
        state = await style_transfer_batch(
            write_manifest(tmp_path / "m.csv", rows),
            str(tmp_path / "out"),
            credentials=account,
            cadence=QUICK,
            return_state=True,
        )
        summary = await state.aresult()
        assert (summary.rows, summary.stored) == (300, 300)
        assert len(list((tmp_path / "out").glob("row-*.jpg"))) == 300
        assert sandbox.service.bill()["accepted"] == 300
        runs = await wait_for_task_runs(state.state_details.flow_run_id, expected=2)
        assert sorted(run.name for run in runs) == ["wave-1", "wave-2"]
        assert all(run.state.is_completed() for run in runs)
        first, second = sorted(runs, key=lambda run: run.name)
        assert second.start_time < first.end_time

    async def test_invalid_row_stops_the_batch_unpaid(self, account, sandbox, tmp_path):
        rows = [("a", "a.jpg", "oil"), ("b", "", ""), ("c", "", "a lighthouse")]
        with pytest.raises(
            ManifestError, match=r"2 of 3 rows .*\n  line 2, .*\n  line 3, "
        ) as caught:
            await style_transfer_batch(
                write_manifest(tmp_path / "m.csv", rows),
                str(tmp_path / "out"),
                credentials=account,
            )
        assert "--skip-invalid" in caught.value.message
        assert sandbox.service.bill()["accepted"] == 0

    async def test_manifest_of_invalid_rows_only_is_refused(self, account, sandbox, tmp_path):
        with pytest.raises(ManifestError, match="1 of 1 rows"):
            await style_transfer_batch(
                write_manifest(tmp_path / "m.csv", [("a", "a.jpg", "oil")]),
                str(tmp_path / "out"),
                credentials=account,
                skip_invalid=True,
            )
        assert sandbox.service.bill()["accepted"] == 0

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            ({"credentials": "{wrong key}"}, UnauthorizedError),
            ({"credentials": "{unreachable}"}, NotConnectedError),
            ({"credentials": "no-such-block"}, ConfigurationError),
            ({"credentials": None}, ConfigurationError),
            ({"manifest": "/no/such/manifest.csv"}, ManifestError),
            ({"manifest": "memory://no/such/manifest.csv"}, ManifestError),
            ({"output": "{file}"}, ConfigurationError),
            ({"output": "nope://x"}, ConfigurationError),
            ({"output": "simplecache::file:///tmp"}, ConfigurationError),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    async def test_invalid_parameter_stops_the_run_unpaid(
        self, wrong, error, account, sandbox, tmp_path, monkeypatch
    ):
        if error in (UnauthorizedError, NotConnectedError):
            changes = {
                UnauthorizedError: {"api_key": "wrong"},
                # A closed port; another unreachable address is tried for a minute.
                NotConnectedError: {"base_url": UNREACHABLE},
            }
            wrong = {
                "credentials": FluxKontextCredentials(
                    **{
                        "api_key": account.api_key,
                        "base_url": account.base_url,
                        **changes[error],
                    }
                )
            }
        manifest = write_manifest(tmp_path / "m.csv", [("a", "", "oil")])
        good = {"manifest": manifest, "output": str(tmp_path / "out"), "credentials": account}
        given = {
            name: value.format(file=manifest) if isinstance(value, str) else value
            for name, value in {**good, **wrong}.items()
        }
        with pytest.raises(error) as caught:
            await style_transfer_batch(**given)
        assert isinstance(caught.value, FluxKontextError)
        assert sandbox.service.bill()["accepted"] == 0
        assert not list(tmp_path.glob("out/*.jpg"))


class TestDeployment:
    @pytest.mark.parametrize("flow", [style_transfer, style_transfer_batch])
    async def test_form_describes_every_parameter(self, flow):
        schema = parameter_schema(flow).model_dump_for_openapi()
        assert json.loads(json.dumps(schema)) == schema
        for name, field in schema["properties"].items():
            assert field.get("description"), name
        assert flow.description

    async def test_form_offers_the_choices(self):
        properties = parameter_schema(style_transfer).model_dump_for_openapi()["properties"]
        assert properties["mode"]["enum"] == ["pro", "max"]
        assert properties["mode"]["default"] == "pro"
        assert properties["output_format"]["enum"] == ["jpeg", "png"]
        assert "16:9" in properties["aspect_ratio"]["enum"]
        assert properties["provider"]["enum"] == ["auto", "value", "official"]
        assert "oil" in properties["style"]["anyOf"][0]["enum"]
        assert parameter_schema(style_transfer_batch).required == ["manifest", "output"]

    @pytest.mark.parametrize(
        "flow", [style_transfer, style_transfer_batch, collect_batch, retry_failed]
    )
    async def test_form_has_at_most_fourteen_fields_and_a_group(self, flow):
        schema = parameter_schema(flow).model_dump_for_openapi()
        fields = set(schema["properties"])
        assert len(fields - {"advanced"}) <= 14
        if "advanced" in fields:
            group = schema["definitions"]["AdvancedOptions"]["properties"]
            assert not fields & set(group)
            assert all(field.get("description") for field in group.values())
            assert "additionalProperties" in schema["definitions"]["AdvancedOptions"]

    async def test_advanced_options_are_keywords_too(self, account, tmp_path):
        rows = [{"id": "a", "prompt": "oil"}]
        summary = await style_transfer_batch(
            rows,
            tmp_path,
            account,
            cadence=CADENCE,
            advanced={"output_names": "x/{id}.{ext}", "output_format": "jpeg"},
            output_format="png",
            callback_url=None,
        )
        assert summary.stored == 1
        assert (tmp_path / "x" / "a.png").exists()

    @pytest.mark.parametrize("wrong", [{"output_name": "{id}"}, {"provider": "cheap"}])
    async def test_wrong_advanced_option_is_refused(self, wrong, account, sandbox, tmp_path):
        with pytest.raises(ParameterTypeError, match=next(iter(wrong))):
            await style_transfer_batch([{"prompt": "x"}], tmp_path, account, advanced=wrong)
        assert sandbox.service.bill()["accepted"] == 0

    @pytest.mark.parametrize("flow", [style_transfer, style_transfer_batch])
    async def test_json_parameters_are_valid(self, flow):
        given = json.loads(
            '{"manifest": "m.csv", "prompt": "oil", "output": "out", "credentials": "studio",'
            ' "cadence": {"initial_delay": 1, "interval": 2.5, "timeout": 60}}'
        )
        if flow is style_transfer:
            del given["manifest"]
        valid = flow.validate_parameters(given)
        assert valid["credentials"] == "studio"
        assert valid.get("advanced", valid)["cadence"].interval == 2.5

    async def test_batch_runs_from_json_and_a_saved_block(self, account, sandbox, tmp_path):
        await account.asave("of-the-deployment", overwrite=True)
        manifest = write_manifest(tmp_path / "m.csv", [("a", "", "oil")])
        parameters = json.loads(
            json.dumps(
                {
                    "manifest": f"file://{manifest}",
                    "output": f"file://{tmp_path}/out",
                    "credentials": "of-the-deployment",
                    "cadence": CADENCE,
                }
            )
        )
        summary = await style_transfer_batch(**parameters)
        assert summary.stored == 1
