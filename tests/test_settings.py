"""The settings: their names in the environment, defaults and precedence."""

import json

import pytest
from pydantic import SecretStr, ValidationError

from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.settings import FluxKontextSettings, find_price

NAMES = {
    "FLUX_KONTEXT_API_KEY": ("api_key", "canary-key", None),
    "FLUX_KONTEXT_BASE_URL": ("base_url", "http://127.0.0.1:8765", "https://api.apixo.ai"),
    "FLUX_KONTEXT_ACCOUNT": ("account", "studio", "default"),
    "FLUX_KONTEXT_REQUESTS_PER_MINUTE": ("requests_per_minute", 60, 10_000),
    "FLUX_KONTEXT_CONCURRENT_TASKS": ("concurrent_tasks", 3, 1_000),
    "FLUX_KONTEXT_POLL_INITIAL_DELAY": ("poll_initial_delay", 1.5, 20.0),
    "FLUX_KONTEXT_POLL_INTERVAL": ("poll_interval", 0.5, 3.0),
    "FLUX_KONTEXT_POLL_TIMEOUT": ("poll_timeout", 60.0, 900.0),
    "FLUX_KONTEXT_CONCURRENT_SUBMITS": ("concurrent_submits", 4, 16),
    "FLUX_KONTEXT_OUTAGE_TIMEOUT": ("outage_timeout", 30.0, 600.0),
    "FLUX_KONTEXT_STOP_TIMEOUT": ("stop_timeout", 5.0, 60.0),
    "FLUX_KONTEXT_HEARTBEAT": ("heartbeat", 1.0, 15.0),
    "FLUX_KONTEXT_LEDGER": ("ledger", "s3://pictures/ledger", None),
    "FLUX_KONTEXT_STAGING_URL": ("staging_url", "s3://pictures/staged", None),
    "FLUX_KONTEXT_STAGING_PUBLIC_URL": ("staging_public_url", "https://a.test", None),
    "FLUX_KONTEXT_REFERENCE_ROOTS": ("reference_roots", ["/data", "s3://bucket"], None),
    "FLUX_KONTEXT_SECRET_PARAMETERS": ("secret_parameters", "ticket,grant", ""),
    "FLUX_KONTEXT_MATCH_REFERENCES": ("match_references", False, True),
    "FLUX_KONTEXT_PRICE_PRO": ("price_pro", 0.04, 0.03),
    "FLUX_KONTEXT_PRICE_PRO_OFFICIAL": ("price_pro_official", 0.05, None),
    "FLUX_KONTEXT_PRICE_MAX": ("price_max", 0.08, 0.06),
    "FLUX_KONTEXT_PRICE_MAX_OFFICIAL": ("price_max_official", 0.1, None),
    "FLUX_KONTEXT_RESULT_DAYS": ("result_days", 1.0, 15.0),
    "FLUX_KONTEXT_STORAGE_OPTIONS": ("storage_options", '{"key": "canary"}', None),
    "FLUX_KONTEXT_AI_MARK": ("ai_mark", False, True),
    "FLUX_KONTEXT_GALLERY_IMAGES": ("gallery_images", 100, 10_000),
    "FLUX_KONTEXT_GALLERY_REFERENCES": ("gallery_references", False, True),
    "FLUX_KONTEXT_CALLBACK_URL": ("callback_url", "https://example.com/hooks", None),
    "FLUX_KONTEXT_CALLBACK_SECRET": ("callback_secret", "canary-secret", None),
    "FLUX_KONTEXT_CALLBACK_LISTEN": ("callback_listen", "127.0.0.1:8780", None),
    "FLUX_KONTEXT_CALLBACK_INBOX": ("callback_inbox", "s3://bucket/inbox", None),
    "FLUX_KONTEXT_CALLBACK_SWEEP": ("callback_sweep", 90.0, 60.0),
    "FLUX_KONTEXT_CALLBACK_GRACE": ("callback_grace", 0.0, 300.0),
    "FLUX_KONTEXT_PUBLIC_URLS": ("public_urls", {"s3://b": "https://b.example.com"}, {}),
    "FLUX_KONTEXT_ASSET_OWNERS": ("asset_owners", ["catalogue team"], []),
}


def value_of(settings, field):
    value = getattr(settings, field)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def test_every_setting_is_tested():
    names = {f"FLUX_KONTEXT_{field.upper()}" for field in FluxKontextSettings.model_fields}
    assert names == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_argument_wins_over_environment_over_default(name, monkeypatch):
    field, value, default = NAMES[name]
    assert value_of(FluxKontextSettings(), field) == default
    monkeypatch.setenv(name, "")
    assert value_of(FluxKontextSettings(), field) == default
    monkeypatch.setenv(name, json.dumps(value) if isinstance(value, dict | list) else str(value))
    assert value_of(FluxKontextSettings(), field) == value
    other = {str: "other", bool: not value, dict: {"s3://b": "other"}, list: ["/b"]}.get(
        type(value), 7
    )
    if isinstance(value, str) and value.startswith("{"):
        other = "{}"
    assert value_of(FluxKontextSettings(**{field: other}), field) == other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REQUESTS_PER_MINUTE", "0"),
        ("REQUESTS_PER_MINUTE", "many"),
        ("CONCURRENT_TASKS", "-1"),
        ("POLL_INITIAL_DELAY", "-1"),
        ("POLL_INTERVAL", "0"),
        ("POLL_INTERVAL", "nan"),
        ("POLL_TIMEOUT", "0"),
        ("CONCURRENT_SUBMITS", "0"),
        ("PRICE_PRO", "-0.01"),
        ("RESULT_DAYS", "0"),
        ("CALLBACK_SWEEP", "0"),
        ("CALLBACK_GRACE", "-1"),
    ],
)
def test_value_out_of_range_names_the_variable_but_no_key(name, value, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "canary-key")
    monkeypatch.setenv(f"FLUX_KONTEXT_{name}", value)
    with pytest.raises(ConfigurationError, match=name) as caught:
        FluxKontextSettings()
    assert "canary" not in str(caught.value)


def test_cadence_follows_the_settings(monkeypatch):
    assert FluxKontextSettings().cadence() == PollingCadence()
    for name, value in (("INITIAL_DELAY", "1"), ("INTERVAL", "2"), ("TIMEOUT", "3")):
        monkeypatch.setenv(f"FLUX_KONTEXT_POLL_{name}", value)
    cadence = FluxKontextSettings().cadence()
    assert cadence == PollingCadence(initial_delay=1, interval=2, timeout=3)


def test_default_cadence_follows_the_services_advice():
    assert (PollingCadence().initial_delay, PollingCadence().interval) == (20, 3)


@pytest.mark.parametrize(
    "wrong", [{"initial_delay": -1}, {"interval": 0}, {"timeout": 0}, {"a": 1}]
)
def test_cadence_out_of_range_is_rejected(wrong):
    with pytest.raises(ValidationError):
        PollingCadence(**wrong)


def test_prices_are_by_mode(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_PRICE_MAX", "0.1")
    assert FluxKontextSettings().prices() == {"pro": 0.03, "max": 0.1}
    monkeypatch.setenv("FLUX_KONTEXT_PRICE_PRO_OFFICIAL", "0.04")
    assert FluxKontextSettings().prices() == {"pro": 0.03, "max": 0.1, "pro official": 0.04}


@pytest.mark.parametrize(
    ("official", "value", "auto"), [(None, 0.03, 0.03), (0.05, 0.03, 0.05), (0.01, 0.03, 0.03)]
)
def test_dearest_route_counts(official, value, auto):
    prices = FluxKontextSettings(price_pro_official=official).prices()
    assert find_price(prices, "pro", "value") == value
    assert find_price(prices, "pro", "auto") == auto
    assert find_price(prices, "pro", "official") == (official or value)


def test_missing_key_names_its_variable():
    with pytest.raises(ConfigurationError, match="FLUX_KONTEXT_API_KEY"):
        FluxKontextSettings().require_api_key()


def test_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "canary-key")
    settings = FluxKontextSettings()
    assert settings.require_api_key().get_secret_value() == "canary-key"
    assert "canary" not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.parametrize("wrong", ["canary", "[1]", '"canary"', '{"key": "canary"', "{" * 99_999])
def test_invalid_storage_options_are_rejected_without_showing_them(wrong, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_STORAGE_OPTIONS", wrong)
    with pytest.raises(
        ConfigurationError, match=r"STORAGE_OPTIONS.*must be a JSON object"
    ) as caught:
        FluxKontextSettings()
    assert "canary" not in repr(caught.value)


def test_storage_options_are_not_shown(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_STORAGE_OPTIONS", '{"secret": "canary"}')
    settings = FluxKontextSettings()
    assert settings.fsspec_options() == {"secret": "canary"}
    assert "canary" not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.parametrize("value", [" {} ", "{}\n", '"{}"', "'{}'", ' "{}" '])
@pytest.mark.parametrize("name", ["API_KEY", "BASE_URL", "STAGING_URL", "PRICE_PRO", "AI_MARK"])
def test_white_space_and_quotes_around_a_value_are_removed(name, value, monkeypatch):
    plain = {"PRICE_PRO": "0.5", "AI_MARK": "false"}.get(name, "https://a.test")
    monkeypatch.setenv(f"FLUX_KONTEXT_{name}", value.format(plain))
    expected = {"PRICE_PRO": 0.5, "AI_MARK": False}.get(name, plain)
    assert value_of(FluxKontextSettings(), name.lower()) == expected


@pytest.mark.parametrize("value", [" ", "\n", '""', "''"])
def test_empty_value_counts_as_unset(value, monkeypatch):
    for name in ("API_KEY", "PRICE_PRO", "STAGING_URL"):
        monkeypatch.setenv(f"FLUX_KONTEXT_{name}", value)
    settings = FluxKontextSettings()
    assert (settings.api_key, settings.price_pro, settings.staging_url) == (None, 0.03, None)


def test_unrelated_variables_are_ignored(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_SOMETHING_ELSE", "1")
    monkeypatch.setenv("ACCOUNT", "another")
    assert FluxKontextSettings().account == "default"


def test_cadence_that_never_polls_is_rejected(monkeypatch):
    with pytest.raises(ValidationError, match="longer than initial_delay"):
        PollingCadence(initial_delay=20, timeout=15)
    monkeypatch.setenv("FLUX_KONTEXT_POLL_TIMEOUT", "15")
    with pytest.raises(ConfigurationError, match="POLL_TIMEOUT must be longer"):
        FluxKontextSettings().cadence()


def test_all_invalid_variables_are_named(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "soon")
    monkeypatch.setenv("FLUX_KONTEXT_CONCURRENT_TASKS", "0")
    with pytest.raises(ConfigurationError, match=r"CONCURRENT_TASKS.*; .*POLL_INTERVAL"):
        FluxKontextSettings()
