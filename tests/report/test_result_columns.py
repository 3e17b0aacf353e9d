"""Your own columns stand beside ours, under a name that is never ours."""

import pytest

from prefect_flux_kontext.report.results import original_column_name, own_columns


@pytest.mark.parametrize(
    ("cells", "own"),
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
def test_a_column_with_the_name_of_one_of_ours_is_set_apart(cells, own):
    assert own_columns(cells) == own


@pytest.mark.parametrize(
    ("name", "meant"),
    [("sku", "sku"), ("manifest_cost_usd", "cost_usd"), ("manifest_of_mine", "manifest_of_mine")],
)
def test_it_has_its_own_name_again_in_a_manifest(name, meant):
    assert original_column_name(name) == meant
