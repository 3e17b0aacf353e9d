"""Flags of result images: what they find, and what they leave alone."""

import io
import json
import random
from threading import Thread

import pytest
from PIL import Image, ImageOps

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.images import checks
from prefect_flux_kontext.images.checks import (
    Fingerprint,
    ResultChecks,
    is_blank,
    is_nearly_same,
    is_padded,
    load_checks,
    take_fingerprint,
)
from prefect_flux_kontext.sandbox.settings import PHOTOS
from tests.cli.conftest import sandbox  # noqa: F401


@pytest.fixture(scope="module")
def cat():
    with Image.open(PHOTOS / "cat.png") as image:
        return image.convert("RGB")


def saved(image, quality=70):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.mark.parametrize("colour", ["black", "white", "#808080", "red"])
def test_one_colour_is_blank_and_nothing_else(colour):
    image = saved(Image.new("RGB", (256, 192), colour))
    assert ResultChecks().find_flags(image, {}, "4:3", None) == ["blank"]


def test_photographs_are_neither_blank_nor_padded():
    for path in PHOTOS.iterdir():
        if path.suffix in (".jpg", ".png", ".webp"):
            with Image.open(path) as image:
                assert not is_blank(image)
                assert not is_padded(image)


@pytest.mark.parametrize("colour", ["black", "white"])
@pytest.mark.parametrize("size", [(600, 300), (451, 400)])
def test_padding_is_found_on_either_axis(cat, colour, size):
    assert is_padded(saved(ImageOps.pad(cat, size, color=colour)))


def test_padding_on_one_side_only_is_part_of_the_picture(cat):
    image = Image.new("RGB", (451, 400), "white")
    image.paste(cat)
    assert not is_padded(image)


def test_unchanged_reference_is_found_after_resize_and_compression(cat):
    reference = take_fingerprint(cat)
    again = saved(cat.resize((902, 600)), quality=50)
    assert "unchanged" in ResultChecks().find_flags(again, {}, "16:9", reference)
    edited = cat.copy()
    edited.paste((200, 30, 30), (150, 100, 210, 150))
    for other in (ImageOps.mirror(cat), ImageOps.grayscale(cat), edited):
        assert not is_nearly_same(reference, take_fingerprint(other))


def test_second_of_two_equal_images_is_flagged(cat):
    checks = ResultChecks()
    fitting = ImageOps.fit(cat, (400, 300))
    assert checks.find_flags(fitting, {}, "4:3", None) == []
    assert checks.find_flags(ImageOps.mirror(fitting), {}, "4:3", None) == []
    assert checks.find_flags(saved(fitting), {}, "4:3", None) == ["repeated"]


@pytest.mark.parametrize(("different", "is_seen"), [(0, True), (6, True), (7, False)])
def test_hashes_are_compared_wherever_their_bits_differ(monkeypatch, different, is_seen):
    chance, cells = random.Random(1), bytes(768)
    for _ in range(100):
        bits = chance.getrandbits(64)
        other = bits ^ sum(1 << at for at in chance.sample(range(64), different))
        hashes = [Fingerprint(other, cells), Fingerprint(bits, cells)]
        monkeypatch.setattr(checks, "take_fingerprint", lambda _: hashes.pop())  # noqa: B023
        result_checks = ResultChecks()
        image = Image.radial_gradient("L")
        assert "repeated" not in result_checks.find_flags(image, {}, "1:1", None)
        assert ("repeated" in result_checks.find_flags(image, {}, "1:1", None)) is is_seen


def test_threads_share_the_checks(cat):
    checks, flags = ResultChecks(), []
    threads = [
        Thread(target=lambda: flags.append(checks.find_flags(cat, {}, "4:3", None)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("repeated" in found for found in flags) == 7


@pytest.mark.parametrize(
    ("ratio", "flags"), [("4:3", []), ("16:9", ["ratio"]), ("3:4", ["ratio"])]
)
def test_other_ratio_than_asked_for_is_flagged(cat, ratio, flags):
    assert ResultChecks().find_flags(ImageOps.fit(cat, (408, 300)), {}, ratio, None) == flags


def is_dark(image, row):
    return [f"dark {row['id']}"] if image.convert("L").getextrema()[0] < 256 else []


def fails(_image, _row):
    raise ZeroDivisionError


def test_own_check_is_run_and_its_failure_is_a_flag(cat, caplog):
    own = load_checks([f"{__name__}:is_dark", f"{__name__}:fails"])
    flags = ResultChecks(own).find_flags(ImageOps.fit(cat, (400, 300)), {"id": "a"}, "4:3", None)
    assert flags == ["dark a", "check failed"]
    assert "failed for row a" in caplog.text


def test_checks_that_cannot_be_imported_are_named_at_once():
    with pytest.raises(ConfigurationError) as error:
        load_checks(["no_module:x", "json:no_function", "json:__name__", "plain"])
    for text in ("no_module:x", "json:no_function", "'json:__name__' is not a function", "plain"):
        assert text in str(error.value)


def test_wrong_check_costs_nothing(sandbox, tmp_path, capsys):  # noqa: F811
    (tmp_path / "m.csv").write_text("id,prompt\na,A cat\n")
    run = ["run", str(tmp_path / "m.csv"), str(tmp_path / "out"), "--check", "no_module:x"]
    assert main(run) == 2
    assert "no_module:x" in capsys.readouterr().err
    assert sandbox.service.bill()["accepted"] == 0


def test_flags_are_in_summary_and_results_of_every_run(sandbox, tmp_path, capsys):  # noqa: F811
    (tmp_path / "m.csv").write_text("id,prompt\na,A cat\nb,A dog\n")
    run = ["run", str(tmp_path / "m.csv"), str(tmp_path / "out")]
    assert main([*run, "--check", f"{__name__}:is_dark"]) == 0
    assert "look at: dark a 1, dark b 1" in capsys.readouterr().out
    assert main([*run, "--json"]) == 0  # stored before
    assert json.loads(capsys.readouterr().out)["flags"] == {"dark a": 1, "dark b": 1}
    results = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [row["check_flags"] for row in map(json.loads, results)] == [["dark a"], ["dark b"]]
