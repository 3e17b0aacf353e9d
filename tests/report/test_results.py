"""Result lines of several runs are merged to one current line for each row."""

import itertools
from decimal import Decimal

import pytest

from prefect_flux_kontext.report.line_index import read_line_index, write_line_index
from prefect_flux_kontext.report.results import (
    LineMerger,
    encode_line,
    merge_lines,
    read_lines,
    write_parquet,
)
from prefect_flux_kontext.report.statistics import Statistics
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.galleries import failed, line

EARLY, LATE = "2026-01-02T03:05:06.000Z", "2026-01-03T00:00:00.000Z"


def merge(folder, earlier, *parts):
    """Merge part files; returns the lines and the names of the custom columns."""
    before, after = folder / "before.jsonl", folder / "after.jsonl"
    before.write_text("".join(map(encode_line, earlier)))
    with LineMerger() as merger:
        for part in parts:
            merger.add("".join(map(encode_line, part)).encode())
        number = merger.write(before, after, {})
        lines = list(read_lines(after))
        assert number == len(lines)
        return lines, list(merger.index.columns)


def test_later_line_replaces_the_earlier_in_place(tmp_path):
    earlier = [failed(0), line(1), failed(2)]
    part = [line(2, recorded_at=LATE), line(3, recorded_at=LATE), line(0, recorded_at=LATE)]
    lines, _ = merge(tmp_path, earlier, part)
    assert [(row["id"], row["state"]) for row in lines] == [
        ("row-0", "stored"),
        ("row-1", "stored"),
        ("row-2", "stored"),
        ("row-3", "stored"),
    ]


def test_merge_accepts_parts_in_any_order_and_twice(tmp_path):
    parts = [
        [line(0, key="a" * 32)],
        [failed(0, recorded_at=LATE, key="a" * 32)],
        [line(0, recorded_at="2026-01-04T00:00:00.000Z", key="a" * 32, source="ledger")],
    ]
    outcomes = []
    for order in itertools.permutations(parts):
        lines, _ = merge(tmp_path, [], *order)
        again, _ = merge(tmp_path, lines, *order)
        assert again == lines
        outcomes.append(lines)
    assert all(lines == outcomes[0] for lines in outcomes)
    assert [row["state"] for row in outcomes[0]] == ["stored"]


def test_row_is_identified_by_id_and_style(tmp_path):
    lines, _ = merge(tmp_path, [], [line(0, style="oil"), line(0, style="noir")])
    assert [row["style"] for row in lines] == ["oil", "noir"]


def test_collected_row_keeps_its_manifest_columns():
    old = failed(0, sku="7", style="oil", key="k")
    new = line(0, recorded_at=LATE, source="ledger", style=None, line=99, key="k")
    made = merge_lines(new, old)
    assert (made["state"], made["sku"], made["style"]) == ("stored", "7", "oil")
    assert (made["line"], made["source"]) == (2, "manifest")
    assert "reason" not in made


def test_line_of_an_older_request_changes_nothing():
    """A collected line with another key does not replace the line of the manifest."""
    now = line(0, key="new prompt")
    collected = line(0, key="old prompt", recorded_at=LATE, source="ledger")
    assert merge_lines(now, collected) == now


@pytest.mark.anyio
@pytest.mark.parametrize("changed", [False, True])
async def test_statistics_go_on_while_lines_are_added(tmp_path, changed):
    """Equal rows are paid for once, also if a later run adds the second."""
    output, lines = OutputFolder(str(tmp_path / "output")), [line(0, key="k"), failed(1, key="j")]
    added = [line(2, key="k", run="b"), line(3, key="new", recorded_at=LATE), failed(4)]
    with LineMerger() as merger:
        merger.add("".join(map(encode_line, lines)).encode())
        merger.write(tmp_path / "none", tmp_path / "one", {})
        merger.index.statistics = count_all(tmp_path / "one")
        await write_line_index(output, merger.index, "stamp")
    if changed:
        added.append(line(0, key="k", recorded_at=LATE))
    with LineMerger() as merger:
        merger.add("".join(map(encode_line, added)).encode())
        known = await read_line_index(output, "stamp")
        assert merger.write(tmp_path / "one", tmp_path / "two", {}, known) == 5
        if changed:
            assert merger.index.statistics is None
        else:
            expected = count_all(tmp_path / "two").summarize()
            assert merger.index.statistics.summarize() == expected
    assert [row["id"] for row in read_lines(tmp_path / "two")] == [
        each["id"] for each in [*lines, *added][:5]
    ]


def count_all(path):
    statistics = Statistics()
    assert all(statistics.count(read_lines(path)))
    return statistics


def test_custom_columns_keep_their_order(tmp_path):
    _, custom = merge(tmp_path, [line(0, zebra="1", apple="2")], [line(1, ball="3", zebra="4")])
    assert custom == ["zebra", "apple", "ball"]


def test_parquet_has_the_same_rows_and_fixed_types(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [line(0, sku="007", uris=["a", "b"]), failed(1)]
    (tmp_path / "lines").write_text("".join(map(encode_line, rows)))
    assert write_parquet(tmp_path / "lines", tmp_path / "some.parquet", {"sku": None})
    (tmp_path / "none").touch()
    assert write_parquet(tmp_path / "none", tmp_path / "none.parquet", {})
    table = pq.read_table(tmp_path / "some.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types["recorded_at"] == "timestamp[ms, tz=UTC]"
    assert types["cost_usd"] == "decimal128(18, 6)"
    assert (types["bytes"], types["stored_before"]) == ("int64", "bool")
    assert types["flow_run_id"] == "string"
    assert (types["uris"], types["sku"]) == ("list<element: string>", "string")
    empty = pq.read_table(tmp_path / "none.parquet").schema
    assert empty == table.schema.remove(table.schema.get_field_index("sku"))
    columns = table.to_pylist()
    assert [str(row.pop("cost_usd")) for row in columns] == ["0.030000", "0.030000"]
    decoded = [
        {name: value for name, value in row.items() if value is not None and "_at" not in name}
        for row in columns
    ]
    assert decoded == [
        {name: value for name, value in row.items() if name != "cost_usd" and "_at" not in name}
        for row in rows
    ]
    assert table["recorded_at"][0].as_py().isoformat() == "2026-01-02T03:05:06+00:00"


def add_rows(folder, kept, rows, columns):
    """Write rows after the kept lines; returns the number and bytes of all, and the row groups."""
    pq = pytest.importorskip("pyarrow.parquet")
    lines, parquet, new = (folder / name for name in ("lines", "parquet", "new"))
    with lines.open("a") as file:
        file.writelines(map(encode_line, rows))
    assert write_parquet(lines, new, columns, parquet, kept)
    new.replace(parquet)
    assert write_parquet(lines, folder / "whole", columns)
    assert pq.read_table(parquet).equals(pq.read_table(folder / "whole"), check_metadata=True)
    kept = kept[0] + len(rows), lines.stat().st_size
    return kept, pq.read_metadata(parquet).num_row_groups


def test_parquet_goes_on_with_the_rows_that_it_has(tmp_path):
    """Its row groups are copied until there are many small ones."""
    kept, groups = add_rows(tmp_path, (0, 0), [line(0), failed(1)], {"sku": None})
    assert groups == 1
    for number in range(2, 52):
        kept, groups = add_rows(tmp_path, kept, [line(number, sku=str(number))], {"sku": None})
        assert groups == number
    assert add_rows(tmp_path, kept, [failed(53)], {"sku": None})[1] == 1


@pytest.mark.parametrize("change", ["damaged", "rows", "columns"])
def test_parquet_of_other_rows_is_written_as_a_whole(tmp_path, change):
    kept, _ = add_rows(tmp_path, (0, 0), [line(0), failed(1)], {"sku": None})
    if change == "damaged":
        (tmp_path / "parquet").write_bytes(b"PAR1 PAR1")
    if change == "rows":
        assert write_parquet(tmp_path / "lines", tmp_path / "parquet", {"sku": None})
        with (tmp_path / "lines").open("a") as file:
            file.write(encode_line(line(2)))
        kept = 3, kept[1]
    columns = {"sku": None, "shop": None} if change == "columns" else {"sku": None}
    assert add_rows(tmp_path, kept, [line(3, shop="a")], columns)[1] == 1


@pytest.mark.parametrize(
    ("cost", "total"), [(0.03, "0.330000"), (1e-06, "0.000011"), (1_234.567891, "13580.246801")]
)
def test_parquet_sums_costs_exactly(tmp_path, cost, total):
    """Eleven rows at $0.03 cost $0.33, which a sum of floats misses."""
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [line(number, cost_usd=cost) for number in range(11)]
    (tmp_path / "lines").write_text("".join(map(encode_line, rows)))
    assert write_parquet(tmp_path / "lines", tmp_path / "costs.parquet", {})
    costs = pq.read_table(tmp_path / "costs.parquet")["cost_usd"]
    assert sum(costs.to_pylist()) == Decimal(total)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({"state": "outstanding", "attempts": 1}, {"state": "stored", "attempts": 1}),
        ({"state": "unknown", "attempts": 0}, {"state": "stored", "attempts": 1}),
        ({"state": "failed", "attempts": None}, {"state": "stored", "attempts": 1}),
        ({"state": "outstanding", "attempts": 1}, {"state": "failed", "attempts": 1}),
        ({"state": "failed", "attempts": 1}, {"state": "unknown", "attempts": 2}),
        ({"state": "failed", "attempts": 1}, {"state": "outstanding", "attempts": 2}),
    ],
)
def test_merge_ignores_clocks_where_states_decide(earlier, later):
    """States and attempts decide although the clock of the later run is behind."""
    before = line(0, **earlier, recorded_at=LATE)
    after = line(0, **later, recorded_at=EARLY)
    assert merge_lines(before, after) == merge_lines(after, before) == after


def test_merge_of_different_requests_uses_the_clock():
    stored = line(0, attempts=2, key="old prompt")
    now = failed(0, attempts=1, key="new prompt", recorded_at=LATE)
    assert merge_lines(stored, now) == merge_lines(now, stored) == now
