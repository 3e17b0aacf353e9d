"""The flow of one image: what it stores, and what it refuses unpaid."""

import json

import pytest
from prefect.exceptions import ParameterTypeError

from prefect_flux_kontext.errors import (
    ConfigurationError,
    FluxKontextError,
    GenerationFailedError,
    ManifestError,
)
from prefect_flux_kontext.flows import style_transfer, style_transfer_batch
from prefect_flux_kontext.images.decode import inspect_image
from prefect_flux_kontext.sandbox.settings import PHOTOS
from tests.orchestration.conftest import QUICK
from tests.support.served_folder import served_folder

pytestmark = pytest.mark.anyio

CADENCE = QUICK.model_dump()


class TestStyleTransfer:
    async def test_image_is_restyled_and_stored(self, account, sandbox, reference, tmp_path):
        (stored,) = await style_transfer(
            "as watercolour",
            str(tmp_path),
            image=reference,
            credentials=account,
            mode="max",
            aspect_ratio="1:1",
            output_format="png",
            name="cat",
            cadence=CADENCE,
        )
        assert stored.uri == f"file://{tmp_path}/cat.png"
        image = inspect_image((tmp_path / "cat.png").read_bytes())
        assert image.format == "png"
        assert (image.width, image.height) == (stored.width, stored.height) == (64, 64)
        assert sandbox.service.bill()["by_mode"] == {"pro": 0, "max": 1}

    async def test_text_alone_creates_an_image(self, account, sandbox, tmp_path):
        (stored,) = await style_transfer(
            "a lighthouse", str(tmp_path), credentials=account, cadence=QUICK
        )
        assert stored.uri == f"file://{tmp_path}/{stored.task_id}.jpg"
        assert sandbox.service.bill()["accepted"] == 1

    async def test_style_gives_the_prompt(self, account, sandbox, tmp_path):
        for prompt in (None, "at dusk"):
            await style_transfer(
                prompt, str(tmp_path), style="oil", credentials=account, cadence=QUICK
            )
        plain, longer = sorted(
            json.loads(path.read_text())["request"]["prompt"]
            for path in tmp_path.rglob("*intent.json")
        )
        assert plain.startswith("Repaint this image as an oil")
        assert longer == f"{plain}\nat dusk"

    async def test_failed_generation_fails_the_run_with_its_code(self, account, tmp_path):
        with pytest.raises(GenerationFailedError) as caught:
            await style_transfer("nsfw", str(tmp_path), credentials=account, cadence=QUICK)
        assert caught.value.code == "CONTENT_VIOLATION"
        assert [path.name for path in tmp_path.iterdir()] == ["_ledger"]

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            ("", "not an http or https URL"),
            ("gist://1/cat.jpg", "not an http or https URL"),
            ("cat.jpg", "does not exist"),
        ],
    )
    async def test_reference_that_cannot_be_fetched_is_refused_unpaid(
        self, image, message, account, sandbox, tmp_path
    ):
        with pytest.raises(FluxKontextError, match=message):
            await style_transfer("oil", str(tmp_path), image=image, credentials=account)
        assert sandbox.service.bill()["accepted"] == 0

    async def test_service_on_this_machine_fetches_a_local_file(self, account, sandbox, tmp_path):
        (stored,) = await style_transfer(
            "oil",
            str(tmp_path),
            image=str(PHOTOS / "cat.png"),
            credentials=account,
            cadence=QUICK,
        )
        assert stored.size > 0
        assert sandbox.service.bill()["accepted"] == 1

    async def test_results_left_for_later_need_a_staging_place(self, account, sandbox, tmp_path):
        """This process would end before the service has fetched the files."""
        with pytest.raises(ManifestError, match="set FLUX_KONTEXT_STAGING_URL"):
            await style_transfer_batch(
                str(PHOTOS), str(tmp_path), account, styles=["oil"], wait="collect"
            )
        assert sandbox.service.bill()["accepted"] == 0

    async def test_local_reference_is_staged(self, account, sandbox, tmp_path, monkeypatch):
        with served_folder(tmp_path / "staged") as public_url:
            monkeypatch.setenv("FLUX_KONTEXT_STAGING_URL", str(tmp_path / "staged"))
            monkeypatch.setenv("FLUX_KONTEXT_STAGING_PUBLIC_URL", public_url)
            (stored,) = await style_transfer(
                "oil",
                str(tmp_path / "out"),
                image=str(PHOTOS / "cat.png"),
                credentials=account,
                cadence=QUICK,
            )
        assert stored.uri == f"file://{tmp_path}/out/{stored.task_id}.jpg"
        assert len(list((tmp_path / "staged").iterdir())) == 1
        assert sandbox.service.bill()["accepted"] == 1

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            ({"prompt": ""}, ValueError),
            ({"prompt": None}, ConfigurationError),
            ({"style": "oils"}, ConfigurationError),
            ({"output": None}, (ConfigurationError, ParameterTypeError)),
            ({"prompt": "x" * 10_001}, ValueError),
            ({"mode": "turbo"}, ParameterTypeError),
            ({"aspect_ratio": "2:1"}, ParameterTypeError),
            ({"cadence": {"interval": 0}}, ParameterTypeError),
            ({"cadence": {"every": 3}}, ParameterTypeError),
            ({"output": "nope://x"}, ConfigurationError),
            ({"output": "/proc/not/writable"}, ConfigurationError),
            ({"credentials": "no-such-block"}, ConfigurationError),
            ({"credentials": None}, ConfigurationError),
        ],
    )
    async def test_invalid_parameter_stops_the_run_unpaid(
        self, wrong, error, account, sandbox, tmp_path
    ):
        good = {"prompt": "oil", "output": str(tmp_path), "credentials": account}
        with pytest.raises(error):
            await style_transfer(**{**good, **wrong})
        assert sandbox.service.bill()["accepted"] == 0
