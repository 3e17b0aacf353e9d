"""Custom columns get names that do not clash with the package's columns."""

import pytest

from prefect_flux_kontext.report.results import extract_custom_columns, original_column_name


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
            {"manifest_cost_usd": "1", "manifest_manifest_cost_usd": "2"},
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
