"""Custom columns get names that do not clash with the package's columns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.report.results import (
    _REQUEST_COLUMNS,
    COLUMNS,
    extract_custom_columns,
    original_column_name,
)


@pytest.mark.parametrize(
    ("cells", "custom"),
    [
        ({"id": "a", "prompt": "b", "sku": "7"}, {"sku": "7"}),
        (
            {"cost_usd": "9.99", "State": "new"},
            {"manifest_cost_usd": "9.99", "manifest_State": "new"},
        ),
        (
            {"manifest_cost_usd": "1", "cost_usd": "2"},
            {"manifest_manifest_cost_usd": "1", "manifest_cost_usd": "2"},
        ),
        (
            {"manifest_prompt": "x", "manifest_mode": "max", "MANIFEST_ID": "1"},
            {
                "manifest_manifest_prompt": "x",
                "manifest_manifest_mode": "max",
                "manifest_MANIFEST_ID": "1",
            },
        ),
        ({"": "nameless", "image": "u"}, {"image": "u"}),
    ],
)
def test_own_columns_prefixes_clashing_names(cells, custom):
    assert extract_custom_columns(cells) == custom


@pytest.mark.parametrize(
    ("name", "original"),
    [("sku", "sku"), ("manifest_cost_usd", "cost_usd"), ("manifest_of_mine", "manifest_of_mine")],
)
def test_original_column_name_removes_the_prefix(name, original):
    assert original_column_name(name) == original


@given(
    st.lists(
        st.sampled_from(["id", "prompt", "mode", "cost_usd", "State", "sku", "manifest_", "key"])
        | st.text(max_size=4),
        unique=True,
    ),
    st.integers(0, 3),
)
def test_names_are_unique_and_found_again(names, prefixes):
    """No custom column comes back under a name with a meaning, except under its own."""
    cells = {f"{'manifest_' * (n % (prefixes + 1))}{name}": "x" for n, name in enumerate(names)}
    custom = extract_custom_columns(cells)
    kept = [name for name in cells if name and name not in _REQUEST_COLUMNS]
    assert len(custom) == len(kept)
    assert [original_column_name(name) for name in custom] == kept
    assert not any(name.casefold() in COLUMNS for name in custom)
