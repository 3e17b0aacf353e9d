"""`flux-kontext styles`, and the options --style and --names."""

import csv

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.sandbox.settings import PHOTOS
from prefect_flux_kontext.styles.styles import builtin_styles

PHOTO = next(iter(sorted(path.name for path in PHOTOS.iterdir() if path.suffix == ".jpg")))


@pytest.fixture
def manifest(tmp_path):
    """Write a manifest of two photographs and return its path."""

    def write(url="http://references.example.com", **more):
        path = tmp_path / "m.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "image", *more])
            for number in (1, 2):
                writer.writerow([number, f"{url}/references/{PHOTO}", *more.values()])
        return str(path)

    return write


def pictures(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))


def test_builtin_styles_are_listed_with_prompts(capsys):
    assert main(["styles"]) == 0
    out = capsys.readouterr().out
    for name, style in builtin_styles().items():
        assert f"{name}\n    {style.prompt[:60]}" in out


def test_styles_of_a_file_are_listed_with_parameters(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("ink: {prompt: 'Redraw {{ id }}', mode: max, aspect_ratio: '1:1'}\n")
    assert main(["styles", str(path)]) == 0
    assert capsys.readouterr().out == "ink  (mode max, aspect_ratio 1:1)\n    Redraw {{ id }}\n"


def test_missing_styles_file_exits_2(tmp_path, capsys):
    assert main(["styles", str(tmp_path / "none.yaml")]) == 2
    assert "There are no styles at" in capsys.readouterr().err


def test_plan_counts_every_image_in_every_style(manifest, tmp_path, capsys):
    path = tmp_path / "own.json"
    path.write_text('{"ink": {"prompt": "Redraw it in ink, {{ sku }}", "mode": "max"}}')
    styles = ["--style", "oil", "--style", str(path)]
    assert main(["plan", manifest(sku="A 1"), str(tmp_path / "out"), *styles]) == 0
    out = capsys.readouterr().out
    assert "        4  rows in" in out
    assert "1 in max at $0.06" in out


def test_run_stores_every_image_in_every_style(sandbox, manifest, tmp_path):
    styles = ["--style", "oil", "--style", "noir"]
    out = tmp_path / "out"
    assert main(["run", manifest(sandbox.url), str(out), *styles]) == 0
    assert pictures(out) == ["1/noir.jpg", "1/oil.jpg", "2/noir.jpg", "2/oil.jpg"]
    assert sandbox.service.bill()["accepted"] == 2


def test_names_option_is_a_template(sandbox, manifest, tmp_path):
    out = tmp_path / "out"
    names = ["--style", "oil", "--names", "{style}/{sku}/{id}.{ext}"]
    assert main(["run", manifest(sandbox.url, sku="A-1"), str(out), *names]) == 0
    assert pictures(out) == ["oil/A-1/1.jpg", "oil/A-1/2.jpg"]


def test_retry_failed_keeps_styles_of_a_file(sandbox, tmp_path, capsys):
    own, out, path = tmp_path / "own.yaml", tmp_path / "out", tmp_path / "rows.csv"
    own.write_text("ink: 'nsfw {{ prompt }}'\n")
    path.write_text("id,prompt\na,a cat\n")
    run = ["run", str(path), str(out), "--style", str(own), "--names", "{style}-{id}.{ext}"]
    assert main(run) == 1
    assert "line 2, a (ink): " in capsys.readouterr().out
    own.write_text("ink: 'in ink {{ prompt }}'\n")
    assert main(["retry-failed", str(out), "--style", str(own)]) == 0
    assert pictures(out) == ["ink-a.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--style", "watercolor"], "did you mean 'watercolour'?"),
        (["--names", "{id}.jpg", "--prompt", "x"], "must end in `.{ext}`"),
        (["--prompt", "{{ a.b }}"], "The prompt for all rows: the template uses attribute access"),
    ],
)
def test_invalid_options_for_all_rows_exit_2(manifest, tmp_path, capsys, options, message):
    assert main(["plan", manifest(), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
