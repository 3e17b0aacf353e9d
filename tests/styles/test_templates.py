"""A template makes a text of a row's columns, and can do nothing else, however it is written."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.styles.templates import is_template, parse_template


def problem(text, **cells):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_template(text).render(cells)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("a {{ colour }} cat", "a red cat"),
        ("a {{ colour|upper }} cat", "a RED cat"),
        ("a {{ 'big ' ~ colour }} cat", "a big red cat"),
        ("a {{ mood|default('calm') }} cat", "a calm cat"),
        ("a cat{% if mood %}, {{ mood }}{% endif %}", "a cat"),
        ("{% if colour == 'red' %}fox{% else %}wolf{% endif %}", "fox"),
        ("{{ 'fox' if 'ed' in colour and not mood else 'wolf' }}", "fox"),
        ("{% if mood == 'calm' %}fox{% elif mood != 'wild' %}cat{% endif %}", "cat"),
        ("{% if sky is defined %}sky{% else %}none{% endif %}", "none"),
        ("{{ photo_title|truncate(9) }}", "A cat..."),
        ("{% raw %}{{ as it is }}{% endraw %}{# left out #}", "{{ as it is }}"),
        ("  {{ colour }}\n", "red"),
    ],
)
def test_columns_conditions_and_a_few_filters_make_the_text(text, made):
    cells = {"colour": " red ", "mood": "  ", "photo title": "A cat on the roof"}
    assert parse_template(text).render(cells) == made


def test_what_a_column_holds_is_never_taken_as_a_template():
    assert (
        parse_template("{{ a }}").render({"a": "{{ b }}{% for x in y %}"})
        == "{{ b }}{% for x in y %}"
    )


def test_a_missing_column_is_named_with_those_that_there_are():
    told = "there is no column 'colour'; there are id, size"
    for text in ("{{ colour }}", "{% if colour %}x{% endif %}", "{{ colour|lower }}"):
        assert problem(text, id="1", size="big") == told


@pytest.mark.parametrize(
    "text", ["{{ mood }}", "{{ 'a ' ~ mood }}", "{{ mood|title }}", "{{ mood|truncate(3) }}"]
)
def test_an_empty_cell_is_not_printed_as_a_hole(text):
    assert problem(text, mood=" ") == "the column 'mood' is empty"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{% for x in range(1000000000) %}x{% endfor %}", "a loop"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "a macro"),
        ("{% set a = 'x' %}", "`set`"),
        ("{% include 'x' %}", "an include"),
        ("{% import 'x' as x %}", "an import"),
        ("{% extends 'x' %}", "`extends`"),
        ("{% block x %}{% endblock %}", "`Block`"),
        ("{{ ''.__class__.__mro__ }}", "a look inside a value (`.`)"),
        ("{{ a['__class__'] }}", "a look inside a value (`[]`)"),
        ("{{ lipsum() }}", "a call"),
        ("{{ a|attr('__class__') }}", "the filter `attr`"),
        ("{{ a|replace('a', 'aaaaaaaa') }}", "the filter `replace`"),
        ("{{ a|map('upper') }}", "the filter `map`"),
        ("{{ 1 is odd }}", "the test `odd`"),
        ("{{ 'x' * 1000000000 }}", "arithmetic"),
        ("{{ 9 ** 9 ** 9 }}", "arithmetic"),
        ("{{ ['x', 'y'] }}", "a list"),
        ("{{ self }}", "`self`"),
        ("{{ a|truncate(*b) }}", "a call with `*`"),
    ],
)
def test_what_could_run_for_ever_or_reach_out_is_refused_before_it_runs(text, told):
    assert problem(text, a="x").startswith(f"the template holds {told}; it may hold columns")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ a", "the template cannot be read: unexpected end"),
        ("{{ photo title }}", "the template cannot be read: expected token"),
        ("{% if a %}x", "the template cannot be read: Unexpected end"),
        ("{{ " + "9" * 5_000 + " }}", "the template cannot be read: "),
        ("{{ " + "(" * 5_000, "nested too deeply"),
        ("{{ " + "not " * 200 + "a }}", "nested too deeply"),
        ("{% if a %}" * 60 + "{% endif %}" * 60, "nested too deeply"),
        ("{{ a" + " ~ a" * 2_000 + " }}", "more than 1,000 parts"),
        ("x" * 20_001, "a template of 20,001 characters; it has at most 20,000"),
    ],
)
def test_a_template_that_is_broken_or_a_bomb_is_told_as_such(text, told):
    assert told in problem(text, a="x")


def test_a_column_of_many_characters_is_not_put_into_a_template():
    told = problem("{{ a }}", a="x" * 10_001)
    assert told.startswith("the column 'a' has 10,001 characters")


def test_a_filter_that_cannot_do_its_work_is_a_problem_of_the_row():
    assert "TypeError" in problem("{{ a|truncate('x') }}", a="long enough")


def test_each_template_is_parsed_once():
    assert parse_template("a {{ colour }}") is parse_template("a {{ colour }}")


def test_text_without_braces_is_no_template():
    assert not is_template("100 % {of} #1")
    assert is_template("a {{ colour }}")
    assert is_template("a {% if x %}")


PIECES = st.sampled_from(
    ["{{", "}}", "{%", "%}", " a ", "b", "'", "|", "upper", "if", "else", "endif", "~", "(", ")",
     ".", "[", "]", "*", "for", "in", "range", "9", "{#", "#}", "==", "not", "is defined", "\n"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=40).map(" ".join) | st.text())
def test_no_text_whatsoever_raises_anything_but_its_problem(text):
    made = ""
    with contextlib.suppress(ValueError):
        made = parse_template(text).render({"a": "x", "b": ""})
    assert isinstance(made, str)
