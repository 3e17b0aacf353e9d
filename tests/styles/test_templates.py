"""Templates render a row's columns; everything else is refused."""

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
    ("text", "rendered"),
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
def test_render_supports_columns_conditions_and_filters(text, rendered):
    cells = {"colour": " red ", "mood": "  ", "photo title": "A cat on the roof"}
    assert parse_template(text).render(cells) == rendered


def test_render_does_not_expand_cell_content():
    assert (
        parse_template("{{ a }}").render({"a": "{{ b }}{% for x in y %}"})
        == "{{ b }}{% for x in y %}"
    )


def test_missing_column_error_lists_columns():
    expected = "there is no column 'colour'; there are id, size"
    for text in ("{{ colour }}", "{% if colour %}x{% endif %}", "{{ colour|lower }}"):
        assert problem(text, id="1", size="big") == expected


@pytest.mark.parametrize(
    "text", ["{{ mood }}", "{{ 'a ' ~ mood }}", "{{ mood|title }}", "{{ mood|truncate(3) }}"]
)
def test_printing_an_empty_cell_is_an_error(text):
    assert problem(text, mood=" ") == "the column 'mood' is empty"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% for x in range(1000000000) %}x{% endfor %}", "a loop"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "a macro"),
        ("{% set a = 'x' %}", "`set`"),
        ("{% include 'x' %}", "an include"),
        ("{% import 'x' as x %}", "an import"),
        ("{% extends 'x' %}", "`extends`"),
        ("{% block x %}{% endblock %}", "`Block`"),
        ("{{ ''.__class__.__mro__ }}", "attribute access (`.`)"),
        ("{{ a['__class__'] }}", "item access (`[]`)"),
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
def test_unsafe_templates_are_refused_at_parse_time(text, expected):
    assert problem(text, a="x").startswith(f"the template uses {expected}; allowed are columns")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ a", "the template cannot be read: unexpected end"),
        ("{{ photo title }}", "the template cannot be read: expected token"),
        ("{% if a %}x", "the template cannot be read: Unexpected end"),
        ("{{ " + "9" * 5_000 + " }}", "the template cannot be read: "),
        ("{{ " + "(" * 5_000, "nested too deeply"),
        ("{{ " + "not " * 200 + "a }}", "nested too deeply"),
        ("{% if a %}" * 60 + "{% endif %}" * 60, "nested too deeply"),
        ("{{ a" + " ~ 'b'" * 2_000 + " }}", "more than 1,000 parts"),
        ("{{ a" + " ~ a" * 2_000 + " }}", "uses columns more than 300 times"),
        ("x" * 20_001, "the template has 20,001 characters; at most 20,000 are"),
    ],
)
def test_broken_or_oversized_templates_are_refused(text, expected):
    assert expected in problem(text, a="x")


def test_overlong_cell_is_refused():
    message = problem("{{ a }}", a="x" * 10_001)
    assert message.startswith("the column 'a' has 10,001 characters")


def test_longest_text_is_below_ten_megabytes():
    """A character that becomes three in upper case, in each of the most cells."""
    text = parse_template("{{ (a" + " ~ a" * 299 + ")|upper }}").render({"a": "\ufb03" * 10_000})
    assert 8_000_000 < len(text) < 10_000_000


def test_failing_filter_raises_value_error():
    assert "TypeError" in problem("{{ a|truncate('x') }}", a="long enough")


def test_parse_template_caches_results():
    assert parse_template("a {{ colour }}") is parse_template("a {{ colour }}")


def test_is_template_needs_jinja_markup():
    assert not is_template("100 % {of} #1")
    assert is_template("a {{ colour }}")
    assert is_template("a {% if x %}")


PIECES = st.sampled_from(
    ["{{", "}}", "{%", "%}", " a ", "b", "'", "|", "upper", "if", "else", "endif", "~", "(", ")",
     ".", "[", "]", "*", "for", "in", "range", "9", "{#", "#}", "==", "not", "is defined", "\n"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=40).map(" ".join) | st.text())
def test_any_text_raises_only_value_error(text):
    rendered = ""
    with contextlib.suppress(ValueError):
        rendered = parse_template(text).render({"a": "x", "b": ""})
    assert isinstance(rendered, str)
