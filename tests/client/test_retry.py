"""Retry delays: backoff and the `Retry-After` header."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.client.retry import jittered_backoff, parse_retry_after


@given(st.integers(1, 10_000))
def test_backoff_is_between_a_quarter_ceiling_and_the_ceiling(attempt):
    ceiling = min(30.0, 2.0 ** min(attempt - 1, 5))
    assert ceiling / 4 <= jittered_backoff(attempt) <= ceiling


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("0", 0), ("7", 7), ("1.5", 1.5), ("301", 300), ("1e9", 300), ("1" * 500, 300)]
    + [(header, None) for header in (None, "", "soon", "-1", "nan", "-inf", "1, 2", "7 s")],
)
def test_retry_after_in_seconds(header, seconds):
    assert parse_retry_after(header) == seconds


@pytest.mark.parametrize(("ahead", "least", "most"), [(60, 50, 60), (86_400, 300, 300)])
def test_retry_after_as_a_date(ahead, least, most):
    moment = datetime.now(UTC) + timedelta(seconds=ahead)
    assert least <= parse_retry_after(format_datetime(moment, usegmt=True)) <= most


@pytest.mark.parametrize("ahead", [-1, -86_400 * 365])
def test_retry_after_in_the_past_is_ignored(ahead):
    moment = datetime.now(UTC) + timedelta(seconds=ahead)
    assert parse_retry_after(format_datetime(moment, usegmt=True)) is None


@given(
    st.text(max_size=40)
    | st.from_regex(r"\A(Mon, )?\d{1,25} Jan \d{1,25} \d{1,25}:\d\d:\d\d [+-]?\d{1,25}\Z")
)
def test_any_retry_after_header_is_seconds_or_none(header):
    seconds = parse_retry_after(header)
    assert seconds is None or 0 <= seconds <= 300
