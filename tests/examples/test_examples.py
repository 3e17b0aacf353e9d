"""Each example, run by the commands of its README: what it has stored, what it has cost."""

import json

import pytest
from PIL import Image

from prefect_flux_kontext.images.decode import inspect_image
from tests.examples.playground import COMMANDS, ROOT, playground, until

pytestmark = pytest.mark.timeout(400)

STYLES = ("watercolour", "poster", "studio")
NIGHT = "prefect deployment run style-transfer-batch/nightly --watch"
SERVED = "polling for scheduled runs"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with playground(tmp_path_factory.mktemp("examples")) as place:
        yield place


def command(of):
    """The one command of the README that names this."""
    (found,) = [line for line in COMMANDS if of in line]
    return found


def test_a_catalogue_is_in_the_bucket_in_three_styles_by_names_of_its_own(place):
    before = place.accepted()
    told = place.ran(command("catalogue.py"))
    assert "9 of 9 rows stored; $0.27 spent" in told
    products = {"kitchen/MUG-01", "models/MOTO-750", "models/RKT-5"}
    wanted = {f"{name}-{style}.jpg" for name in products for style in STYLES}
    assert place.stored("restyled") == wanted
    for name in wanted:
        assert f"s3://shop/restyled/{name}\n" in told
        assert inspect_image(place.bucket.cat(f"shop/restyled/{name}")).format == "jpeg"
    rows = [
        json.loads(row) for row in place.bucket.cat("shop/restyled/results.jsonl").splitlines()
    ]
    (studio,) = [row for row in rows if (row["id"], row["style"]) == ("RKT-5", "studio")]
    assert (
        "this model rocket of painted balsa on a seamless warm grey backdrop" in studio["prompt"]
    )
    assert studio["category"] == "models"
    assert studio["references"] == ["s3://shop/photos/rocket.jpg"]
    assert place.accepted() - before == 9


def test_a_night_is_scheduled_and_the_second_pays_only_for_the_picture_that_is_new(place):
    before = place.accepted()
    with place.running(command("nightly.py"), SERVED):
        deployment = place.ask_prefect("/deployments/name/style-transfer-batch/nightly")
        (schedule,) = deployment["schedules"]
        assert schedule["active"]
        assert schedule["schedule"]["cron"] == "0 2 * * *"
        assert "Completed" in place.ran(NIGHT)
        first = {"astronaut/watercolour.jpg", "cat/watercolour.jpg"}
        assert place.stored("nightly") == first
        assert place.accepted() - before == 2
        place.ran(command("filesystem('s3').copy"))
        assert "Completed" in place.ran(NIGHT)
    assert place.stored("nightly") == first | {"rocket/watercolour.jpg"}
    assert place.accepted() - before == 3


def test_an_upload_that_is_announced_starts_the_flow_that_restyles_it(place):
    before = place.accepted()
    asked = {"deployments": {"name": {"any_": ["on-upload"]}}}

    def ended():
        runs = place.ask_prefect("/flow_runs/filter", asked)
        return runs if runs and runs[0]["state"]["type"] in ("COMPLETED", "FAILED") else None

    with place.running(command("restyle_uploads.py"), SERVED):
        assert "Announced s3://shop/orders/summer.csv" in place.ran(command("upload.py"))
        (run,) = until(ended, "the flow run of the upload")
    assert run["state"]["type"] == "COMPLETED"
    assert run["created_by"]["type"] == "AUTOMATION"
    assert run["parameters"] == {
        "manifest": "s3://shop/orders/summer.csv",
        "output": "s3://shop/delivered/summer",
        "prompt": "in the light of a summer evening",
        "budget_usd": 20,
    }
    assert place.stored("delivered/summer") == {"1.jpg", "2.jpg"}
    assert place.accepted() - before == 2


def test_a_wish_against_the_content_rules_takes_the_branch_and_the_others_do_not(place):
    before = place.accepted()
    told = place.ran(command("postcards.py"))
    pictures = {}
    for guest in ("room-101", "room-102", "room-103"):
        path = place.folder / "postcards" / f"{guest}.png"
        assert f"{guest}  {path.as_uri()}" in told
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width * 3 == picture.height * 4
            pictures[guest] = picture.tobytes()
    assert len(set(pictures.values())) == 3
    # Three wishes, one of them refused, and the motif of the house in its place.
    assert place.accepted() - before == 4
    asked = {"artifacts": {"key": {"any_": ["wishes-to-read"]}}}
    (artifact,) = place.ask_prefect("/artifacts/filter", asked)
    (wish,) = json.loads(artifact["data"])
    assert wish["guest"] == "room-102"
    assert "content rules" in wish["said"]


def test_posters_are_made_of_text_alone_each_as_its_line_asks(place):
    before = place.accepted()
    assert "3 of 3 rows stored; $0.09 spent" in place.ran(command("posters.py"))
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
    assert place.accepted() - before == 3


def test_the_readme_says_how_each_example_is_run():
    folder = {path.parent.name for path in ROOT.glob("examples/*/*.py")}
    named = {line.split("/")[1] for line in COMMANDS if line.startswith("python examples/")}
    assert named == folder | {"playground.py"}
