"""Rows in styles: each image is made in each style, and a row's own values take precedence."""

import pytest

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.styles.styles import builtin_styles
from tests.support.plans import build_plan

URL = "http://references.test/cat.jpg"
OIL = builtin_styles()["oil"].prompt


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a file of styles and returns its path."""

    def write(content):
        path = tmp_path / "own.yaml"
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def rows(*cells, **given):
    return list(Manifest([{"image": URL, **row} for row in cells], **given).rows())


def prompt(styles=None, default=None, **cells):
    (row,) = rows(cells, styles=styles, prompt=default)
    return row.request.prompt if isinstance(row, Row) else row.reason


def test_every_row_is_made_in_every_style_in_order():
    made = rows({"id": "b"}, {"id": "a"}, styles=["oil", "noir", "neon"])
    assert [row.name for row in made] == [
        f"{row}/{style}" for row in "ba" for style in ("oil", "noir", "neon")
    ]
    assert [(row.line, row.style) for row in made[:2]] == [(1, "oil"), (1, "noir")]
    assert len({row.key for row in made}) == 3
    again = rows({"id": "b"}, {"id": "a"}, styles=["oil", "noir", "neon"])
    assert made == again


def test_row_with_a_style_is_made_in_it_only():
    made = rows({"id": "a", "style": "neon"}, {"id": "b"}, {"id": "c", "style": " "}, styles="oil")
    assert [row.style for row in made] == ["neon", "oil", "oil"]
    (row,) = rows({"id": "a", "style": "oil"})
    assert (row.request.prompt, row.name) == (OIL, "a/oil")


def test_rows_without_styles_are_unchanged():
    (row,) = rows({"id": "a", "prompt": "x"})
    assert (row.style, row.name, row.request.prompt) == (None, "a", "x")
    assert row.cells == {"image": URL, "id": "a", "prompt": "x"}


def test_unknown_style_is_refused_with_the_known_ones():
    reason = prompt(style="watercolor")
    assert reason.startswith(
        "there is no style 'watercolor', did you mean 'watercolour'? (there are"
    )
    with pytest.raises(ConfigurationError, match="no style 'inc'"):
        rows({"id": "a"}, styles=["inc"])


def test_cells_override_style_and_style_overrides_defaults(file):
    own = file("ink: {prompt: x, mode: max, aspect_ratio: '1:1', extra: {steps: 4}}")
    first, second = rows({"id": "a"}, {"id": "b", "aspect_ratio": "3:4"}, styles=own)
    assert first.request.model_dump(exclude_defaults=True) == {
        "prompt": "x",
        "image_urls": [URL],
        "mode": "max",
        "aspect_ratio": "1:1",
        "extra": {"steps": 4},
    }
    assert (second.request.mode, second.request.aspect_ratio) == ("max", "3:4")
    assert first.key != second.key


def test_style_places_the_prompt_or_appends_it(file):
    own = file("ink: 'Ink: {{ prompt }}, on {{ paper }}.'")
    assert prompt(own, prompt="a cat", paper="rice") == "Ink: a cat, on rice."
    assert prompt(own, "a dog", paper="rice") == "Ink: a dog, on rice."
    assert prompt("oil", prompt="a cat") == f"{OIL}\na cat"
    assert prompt("oil", "for all") == f"{OIL}\nfor all"
    assert prompt("oil") == OIL


def test_style_with_missing_column_refuses_the_row(file):
    own = file("ink: 'Ink: {{ prompt }}, on {{ paper }}.'")
    assert prompt(own, prompt="a cat") == (
        "style 'ink': there is no column 'paper'; there are image, prompt, style"
    )
    assert prompt(own, paper="rice") == "style 'ink': the column 'prompt' is empty"


def test_prompts_are_templates_over_every_column():
    assert prompt(prompt="{{ mood }} cat", mood="calm") == "calm cat"
    assert prompt(
        None, "{{ mood|upper }} cat in {{ style|default('no style') }}", mood="calm"
    ) == ("CALM cat in no style")
    assert prompt("oil", "in {{ style }}") == f"{OIL}\nin oil"
    assert prompt(prompt="100 % {mood}", mood="calm") == "100 % {mood}"


def test_prompt_that_contains_itself_is_refused():
    assert prompt(prompt="x {{ prompt }}") == (
        "prompt: a prompt cannot contain itself, `{{ prompt }}`"
    )


def test_invalid_default_prompt_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="The prompt for all rows: the template uses"):
        rows({"id": "a"}, prompt="{% for x in y %}{% endfor %}")


def test_empty_reference_is_not_paid_for_in_a_style():
    (row,) = rows({"image": "", "id": "a"}, styles="oil")
    assert row.reason == "the row has neither an image nor a prompt of its own; add one of them"
    (row,) = rows({"image": "", "prompt": "a lighthouse"}, styles="oil")
    assert row.request.image_urls == []


def test_made_id_does_not_depend_on_the_style():
    plain, *styled = [*rows({"prompt": "x"}), *rows({"prompt": "x"}, styles=["oil", "noir"])]
    assert {row.id for row in styled} == {plain.id}


def test_invalid_line_is_refused_in_every_style():
    made = rows({"id": "a", "mode": "turbo"}, styles=["oil", "noir"])
    assert [row.cells["style"] for row in made] == ["oil", "noir"]
    assert all("mode 'turbo'" in row.reason for row in made)


def test_refused_row_with_image_keeps_the_default_prompt():
    (row,) = rows({"id": "a", "mode": "turbo"}, prompt="in ink", styles="oil")
    assert (row.cells["prompt"], row.cells["style"]) == ("in ink", "oil")
    (row,) = rows({"id": "a", "image": ""}, prompt="in ink", styles="oil")
    assert "prompt" not in row.cells


def test_plan_prices_every_image_of_the_matrix(file):
    made = Manifest(
        [{"image": URL, "id": n} for n in range(10)],
        styles=["oil", file("ink: {prompt: x, mode: max}")],
    )
    plan = build_plan(made)
    # All ten rows request the same image in the same two styles.
    assert (plan.rows, plan.duplicates, plan.to_pay) == (20, 18, 2)
    assert plan.price == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("cells", "given"),
    [
        ({"id": "a"}, {"styles": ["oil", "noir"]}),
        ({}, {"styles": "oil", "prompt": "{{ mood }} light"}),
        ({"id": "b/c d"}, {"styles": "oil", "names": "{style}/{mood}/{id}.{ext}"}),
        ({"prompt": "a cat"}, {"names": "{mood}/{id}.{ext}"}),
        ({"id": "e", "output": "site/hero.jpg"}, {"prompt": "for all"}),
        ({"id": "f", "style": "neon"}, {"prompt": "for all", "names": "{style}.{ext}"}),
    ],
)
def test_cells_of_a_row_reproduce_the_row(cells, given):
    for row in rows({"mood": "Très calm", **cells}, **given):
        (again,) = Manifest([dict(row.cells)]).rows()
        assert not isinstance(again, RefusedRow), again
        assert (again.id, again.key, again.name, again.style) == (
            row.id,
            row.key,
            row.name,
            row.style,
        )
