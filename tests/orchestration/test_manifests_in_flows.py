"""Manifests of the batch flow: rows as dicts and tables, styles, output names."""

import pandas as pd
import polars as pl
import pytest
from prefect import get_client

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.flows import retry_failed, style_transfer_batch
from tests.orchestration.conftest import QUICK

pytestmark = pytest.mark.anyio

CADENCE = QUICK.model_dump()


class OldFrame(pd.DataFrame):
    """A table of pandas before 2.2, which has no interface of Arrow."""

    @property
    def __arrow_c_stream__(self):
        raise AttributeError


class TestManifestsInFlows:
    async def test_rows_as_dicts_use_mapped_columns(self, account, reference, tmp_path):
        summary = await style_transfer_batch(
            [{"sku": 1, "photo": reference}, {"sku": 2, "photo": reference}],
            str(tmp_path),
            credentials=account,
            prompt="oil",
            columns={"id": "sku", "image": "photo"},
            cadence=CADENCE,
        )
        assert (summary.rows, summary.stored) == (2, 2)
        assert {path.name for path in tmp_path.glob("*.jpg")} == {"1.jpg", "2.jpg"}

    async def test_rows_are_made_in_each_style_and_named(
        self, account, reference, sandbox, tmp_path
    ):
        summary = await style_transfer_batch(
            [{"id": "a", "image": reference, "sku": 7}],
            str(tmp_path),
            credentials=account,
            styles=["oil", "noir"],
            output_names="{sku}/{id}-{style}.{ext}",
            cadence=CADENCE,
        )
        assert (summary.rows, summary.stored) == (2, 2)
        assert {path.name for path in tmp_path.glob("7/*.jpg")} == {"a-noir.jpg", "a-oil.jpg"}
        with pytest.raises(ConfigurationError, match="did you mean 'oil'"):
            await style_transfer_batch([], str(tmp_path), credentials=account, styles="oils")
        assert sandbox.service.bill()["accepted"] == 2

    async def test_failed_rows_are_retried_in_their_style(self, account, sandbox, tmp_path):
        own = tmp_path / "own.yaml"
        for style, states in (("nsfw", (0, 1)), ("in ink", (1, 0))):
            own.write_text(f"ink: '{style}, {{{{ prompt }}}}'\n", encoding="utf-8")
            given = {"credentials": account, "styles": str(own), "cadence": CADENCE}
            if style == "nsfw":
                rows = [{"id": "a", "prompt": "a cat"}]
                summary = await style_transfer_batch(rows, str(tmp_path), **given)
            else:
                summary = await retry_failed(str(tmp_path), **given)
            assert (summary.stored, summary.failed) == states
        assert (tmp_path / "a" / "ink.jpg").exists()

    async def test_table_is_not_stored_in_prefect(self, account, tmp_path):
        table = pl.DataFrame({"id": ["a"], "prompt": ["a canary of a prompt"]})
        state = await style_transfer_batch(
            table, str(tmp_path), credentials=account, cadence=CADENCE, return_state=True
        )
        assert (await state.aresult()).stored == 1
        async with get_client() as client:
            run = await client.read_flow_run(state.state_details.flow_run_id)
        assert run.parameters["manifest"] == "<DataFrame of 1 rows>"

    @pytest.mark.parametrize("kind", ["list", "tuple", "polars", "pandas", "arrow"])
    async def test_rows_are_never_recorded(self, account, tmp_path, kind):
        rows = [{"id": f"r{n}", "prompt": "a canary of a prompt"} for n in range(2)]
        given = {
            "list": lambda: rows,
            "tuple": lambda: tuple(rows),
            "polars": lambda: pl.DataFrame(rows),
            "pandas": lambda: pl.DataFrame(rows).to_pandas(),
            "arrow": lambda: pl.DataFrame(rows).to_arrow(),
        }[kind]()
        state = await style_transfer_batch.with_options(name="renamed")(
            given, str(tmp_path), credentials=account, cadence=CADENCE, return_state=True
        )
        assert (await state.aresult()).stored == 2
        async with get_client() as client:
            run = await client.read_flow_run(state.state_details.flow_run_id)
        assert "canary" not in str(run.parameters)

    async def test_long_list_of_rows_runs(self, account, tmp_path):
        rows = [{"id": f"r{n}", "prompt": "ink " * 100} for n in range(1_700)]
        summary = await style_transfer_batch(
            rows, str(tmp_path), credentials=account, cadence=CADENCE, dry_run=True
        )
        assert (summary.rows, summary.not_submitted) == (1_700, 1_700)

    async def test_signature_of_a_manifest_is_not_recorded(self, account, tmp_path):
        url = "http://127.0.0.1:9/m.csv?X-Amz-Signature=canary"
        state = await style_transfer_batch(
            url, str(tmp_path), credentials=account, cadence=CADENCE, return_state=True
        )
        assert state.is_failed()
        async with get_client() as client:
            run = await client.read_flow_run(state.state_details.flow_run_id)
        assert run.parameters["manifest"] == "http://127.0.0.1:9/m.csv"

    async def test_other_types_are_not_a_manifest(self, tmp_path):
        with pytest.raises(TypeError, match="a list of dicts or a table"):
            await style_transfer_batch(7, str(tmp_path))

    async def test_table_of_old_pandas_is_refused_unseen(self, tmp_path, caplog):
        table = OldFrame({"id": ["a"], "prompt": ["a canary of a prompt"]})
        state = await style_transfer_batch(table, str(tmp_path), return_state=True)
        assert "pandas since 2.2), not OldFrame." in state.message
        assert "canary" not in f"{state.message}{caplog.text}"
        async with get_client() as client:
            run = await client.read_flow_run(state.state_details.flow_run_id)
        assert "canary" not in str(run.parameters)
