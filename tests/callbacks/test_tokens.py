import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.callbacks.tokens import (
    Attempt,
    create_token,
    parse_token,
    validate_secret,
)
from prefect_flux_kontext.errors import ConfigurationError

SECRET = b"a-secret-of-the-tests-0123456789"
ATTEMPT = Attempt("0123456789abcdef", "0123456789abcdef" * 2, 3)

digits = st.text("0123456789abcdef", min_size=16, max_size=16)
attempts = st.builds(
    Attempt, digits, st.builds("".join, st.tuples(digits, digits)), st.integers(1, 999_999)
)


@given(attempts)
def test_token_names_its_attempt(attempt):
    assert parse_token(SECRET, create_token(SECRET, attempt)) == attempt


@given(attempts, st.integers(0, 200), st.characters())
def test_changed_token_is_refused(attempt, place, other):
    token = create_token(SECRET, attempt)
    place %= len(token)
    changed = token[:place] + other + token[place + 1 :]
    assert parse_token(SECRET, changed) == (attempt if changed == token else None)


@given(st.text())
def test_arbitrary_text_is_refused(text):
    assert parse_token(SECRET, text) is None


def test_token_of_another_secret_is_refused():
    assert parse_token(SECRET[::-1], create_token(SECRET, ATTEMPT)) is None


def test_token_needs_no_url_escaping():
    token = create_token(SECRET, ATTEMPT)
    assert token.startswith("0123456789abcdef.0123456789abcdef0123456789abcdef.3.")
    assert len(token) < 120
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@pytest.mark.parametrize("secret", [None, "", "short", " " * 40, "a" * 24, "abcabca" * 9])
def test_weak_secret_is_refused(secret):
    with pytest.raises(ConfigurationError, match="openssl rand -hex 32"):
        validate_secret(secret)
