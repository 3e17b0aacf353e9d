"""Each example, run with the commands of the README: what it stores and what it costs."""

import json
import re

import pytest
from PIL import Image

from prefect_flux_kontext.images.decode import inspect_image
from tests.examples.playground import COMMANDS, ROOT, playground, wait_until

pytestmark = pytest.mark.timeout(400)

STYLES = ("watercolour", "poster", "studio")
NIGHT = "prefect deployment run style-transfer-batch/nightly --watch"
SERVED = "polling for scheduled runs"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with playground(tmp_path_factory.mktemp("examples")) as place:
        yield place


def command(text):
    """Return the one command of the README that contains a text."""
    (found,) = [line for line in COMMANDS if text in line]
    return found


def test_catalogue_is_stored_in_three_styles_with_its_own_names(place):
    before = place.count_billed()
    output = place.run(command("catalogue.py"))
    assert "9 of 9 rows stored; $0.27 spent" in output
    products = {"kitchen/MUG-01", "models/MOTO-750", "models/RKT-5"}
    wanted = {f"{name}-{style}.jpg" for name in products for style in STYLES}
    assert place.list_images("restyled") == wanted
    for name in wanted:
        assert f"s3://shop/restyled/{name}\n" in output
        assert inspect_image(place.bucket.cat(f"shop/restyled/{name}")).format == "jpeg"
    rows = [
        json.loads(row) for row in place.bucket.cat("shop/restyled/results.jsonl").splitlines()
    ]
    (studio,) = [row for row in rows if (row["id"], row["style"]) == ("RKT-5", "studio")]
    assert (
        "this model rocket of painted balsa on a seamless warm grey backdrop" in studio["prompt"]
    )
    assert studio["category"] == "models"
    assert studio["reference_images"] == ["s3://shop/photos/rocket.jpg"]
    assert place.count_billed() - before == 9


def test_second_night_pays_only_for_the_new_image(place):
    before = place.count_billed()
    with place.running(command("nightly.py"), SERVED):
        deployment = place.ask_prefect("/deployments/name/style-transfer-batch/nightly")
        (schedule,) = deployment["schedules"]
        assert schedule["active"]
        assert schedule["schedule"]["cron"] == "0 2 * * *"
        assert "Completed" in place.run(NIGHT)
        first = {"astronaut/watercolour.jpg", "cat/watercolour.jpg"}
        assert place.list_images("nightly") == first
        assert place.count_billed() - before == 2
        place.run(command("filesystem('s3').copy"))
        assert "Completed" in place.run(NIGHT)
    assert place.list_images("nightly") == first | {"rocket/watercolour.jpg"}
    assert place.count_billed() - before == 3


def test_announced_upload_starts_the_flow(place):
    before = place.count_billed()
    body = {"deployments": {"name": {"any_": ["on-upload"]}}}

    def find_ended():
        runs = place.ask_prefect("/flow_runs/filter", body)
        return runs if runs and runs[0]["state"]["type"] in ("COMPLETED", "FAILED") else None

    with place.running(command("restyle_uploads.py"), SERVED):
        assert "Announced s3://shop/orders/summer.csv" in place.run(command("upload.py"))
        (run,) = wait_until(find_ended, "the flow run of the upload")
    assert run["state"]["type"] == "COMPLETED"
    assert run["created_by"]["type"] == "AUTOMATION"
    assert run["parameters"] == {
        "manifest": "s3://shop/orders/summer.csv",
        "output": "s3://shop/delivered/summer",
        "prompt": "in the light of a summer evening",
        "budget_usd": 20,
    }
    assert place.list_images("delivered/summer") == {"1.jpg", "2.jpg"}
    assert place.count_billed() - before == 2


def test_only_the_rejected_wish_takes_the_branch(place):
    before = place.count_billed()
    output = place.run(command("postcards.py"))
    pictures = {}
    for guest in ("room-101", "room-102", "room-103"):
        path = place.folder / "postcards" / f"{guest}.png"
        assert f"{guest}  {path.as_uri()}" in output
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width * 3 == picture.height * 4
            pictures[guest] = picture.tobytes()
    assert len(set(pictures.values())) == 3
    # Three wishes, of which one is rejected, and the motif in its place.
    assert place.count_billed() - before == 4
    body = {"artifacts": {"key": {"any_": ["wishes-to-review"]}}}
    (artifact,) = place.ask_prefect("/artifacts/filter", body)
    (wish,) = json.loads(artifact["data"])
    assert wish["guest"] == "room-102"
    assert "content rules" in wish["message"]


def test_killed_flow_is_run_again_and_pays_nothing(place):
    before = place.count_billed()
    output = place.run(command("seasons.py"))
    killed, stored = re.findall(r"Exit status (-?\d+)\. Billed so far: (\d+) images", output)
    assert killed == ("-9", str(before + 4))
    assert stored == ("0", str(before + 4))
    for season in ("spring", "summer", "autumn", "winter"):
        path = place.folder / "seasons" / f"{season}.jpg"
        assert path.as_uri() in output
        assert inspect_image(path.read_bytes()).format == "jpeg"


def test_posters_follow_the_fields_of_their_lines(place):
    before = place.count_billed()
    assert "3 of 3 rows stored; $0.09 spent" in place.run(command("posters.py"))
    posters = place.folder / "posters"
    shapes = {}
    for name in ("autumn/tempest.png", "autumn/birds.png", "spring/seagull.jpg"):
        with Image.open(posters / name) as picture:
            shapes[name] = (picture.format, picture.width / picture.height)
    assert shapes == {
        "autumn/tempest.png": ("PNG", 3 / 4),
        "autumn/birds.png": ("PNG", 3 / 4),
        "spring/seagull.jpg": ("JPEG", 9 / 16),
    }
    prompts = {
        row["id"]: row["prompt"]
        for row in map(json.loads, (posters / "results.jsonl").read_text().splitlines())
    }
    assert "poster for The Birds: a city of nests" in prompts["birds"]
    assert "in white and cobalt" in prompts["birds"]
    assert "in two flat colours" in prompts["tempest"]
    assert (posters / "gallery.html").exists()
    assert place.count_billed() - before == 3


def test_readme_runs_every_example():
    folders = {path.parent.name for path in ROOT.glob("examples/*/*.py")}
    named = {line.split("/")[1] for line in COMMANDS if line.startswith("python examples/")}
    assert named == folders | {"playground.py"}
