"""The credentials Block follows Prefect's standards, and credentials are resolved in order."""

import asyncio
import base64
import importlib.metadata
import subprocess
import sys

import prefect.plugins
import pytest
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentCreate
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

import prefect_flux_kontext
from prefect_flux_kontext import FluxKontextCredentials
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError, UnauthorizedError
from tests.orchestration.conftest import KEY

SLUG = "flux-kontext-credentials"


class TestBlockStandards(BlockStandardTestSuite):
    @pytest.fixture
    def block(self):
        return FluxKontextCredentials

    def test_has_a_valid_image(self, block):
        # The suite's own test downloads the logo, but these tests connect only to loopback. The
        # logo is that of Prefect's own Secret Block.
        assert block._logo_url == Secret._logo_url
        assert str(block._logo_url).startswith("https://")


@pytest.mark.anyio
async def test_registering_the_package_registers_its_blocks(prefect_api):
    registered = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "prefect", "block", "register", "-m", "prefect_flux_kontext"],
        env=prefect_api.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert registered.returncode == 0, registered.stderr
    assert "Successfully registered 2 blocks" in registered.stdout
    async with get_client() as client:
        kinds = await client.read_block_types()
    kind, job = sorted((kind for kind in kinds if "flux" in kind.slug), key=lambda k: k.slug)
    assert (kind.slug, kind.name) == (SLUG, "Flux Kontext Credentials")
    assert (job.slug, job.name) == (
        "flux-kontext-image-generation",
        "Flux Kontext Image Generation",
    )
    assert kind.description.startswith("An account of the Flux Kontext image API")
    async with get_client() as client:
        checksum = FluxKontextCredentials._calculate_schema_checksum()
        schema = await client.read_block_schema_by_checksum(checksum)
    assert schema.version == prefect_flux_kontext.__version__
    assert schema.fields["required"] == ["api_key"]
    assert schema.fields["secret_fields"] == ["api_key", "callback_secret"]


def test_schema_does_not_depend_on_the_environment(monkeypatch):
    before = FluxKontextCredentials._calculate_schema_checksum()
    monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("FLUX_KONTEXT_REQUESTS_PER_MINUTE", "7")
    assert FluxKontextCredentials._calculate_schema_checksum() == before


def test_entry_point_lets_prefect_find_the_block():
    (entry,) = (
        point
        for point in importlib.metadata.entry_points(group="prefect.collections")
        if point.name == "prefect_flux_kontext"
    )
    module = prefect.plugins.load_prefect_collections()[entry.name]
    assert not isinstance(module, Exception)
    assert module.FluxKontextCredentials is FluxKontextCredentials
    assert Block.get_block_class_from_key(SLUG) is FluxKontextCredentials


@pytest.mark.anyio
async def test_saved_block_does_not_read_the_environment(monkeypatch):
    saved = FluxKontextCredentials(
        api_key="secret",
        base_url="http://127.0.0.1:1",
        account="studio",
        requests_per_minute=60,
        concurrent_tasks=3,
    )
    await saved.asave("round-trip")
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "another")
    monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", "http://127.0.0.1:2")
    monkeypatch.setenv("FLUX_KONTEXT_ACCOUNT", "other")
    loaded = await FluxKontextCredentials.aload("round-trip")
    assert loaded.model_dump() == saved.model_dump()
    assert loaded.api_key.get_secret_value() == "secret"


def test_block_can_be_saved_and_loaded_without_a_loop():
    FluxKontextCredentials(api_key="secret", account="sync").save("sync-round-trip")
    assert FluxKontextCredentials.load("sync-round-trip").account == "sync"


@pytest.mark.parametrize("field", ["aip_key", "base_ulr", "extra"])
def test_unknown_field_is_rejected(field):
    with pytest.raises(ValidationError, match=field):
        FluxKontextCredentials(api_key="secret", **{field: "x"})


@pytest.mark.parametrize("limit", ["requests_per_minute", "concurrent_tasks"])
def test_limit_below_one_is_rejected(limit):
    with pytest.raises(ValidationError, match=limit):
        FluxKontextCredentials(api_key="secret", **{limit: 0})


def test_key_is_not_shown():
    block = FluxKontextCredentials(api_key="canary-key")
    client = block.get_client()
    for shown in (repr(block), str(block), block.model_dump_json(), repr(client), str(client)):
        assert "canary-key" not in shown
        assert base64.b64encode(b"canary-key").decode() not in shown


def test_unset_field_comes_from_the_environment(monkeypatch):
    assert FluxKontextCredentials(api_key="k").base_url == "https://api.apixo.ai"
    monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("FLUX_KONTEXT_CONCURRENT_TASKS", "7")
    block = FluxKontextCredentials(api_key="k")
    assert (block.base_url, block.concurrent_tasks) == ("http://127.0.0.1:9", 7)
    assert FluxKontextCredentials(api_key="k", concurrent_tasks=8).concurrent_tasks == 8


@pytest.mark.anyio
async def test_block_wins_over_saved_name_over_environment(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "of-the-environment")
    block = FluxKontextCredentials(api_key="of-the-argument")
    await FluxKontextCredentials(api_key="of-the-saved-block").asave("precedence")
    assert await resolve_credentials(block) is block
    by_name = await resolve_credentials("precedence")
    assert by_name.api_key == SecretStr("of-the-saved-block")
    by_environment = await resolve_credentials(None)
    assert by_environment.api_key == SecretStr("of-the-environment")


@pytest.mark.anyio
async def test_missing_key_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="No API key: set FLUX_KONTEXT_API_KEY"):
        await resolve_credentials(None)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["nobody", "", "no/such/block", "../x", "Größe", "a b?c=d"])
async def test_unknown_block_name_is_a_configuration_error(name):
    with pytest.raises(ConfigurationError) as caught:
        await resolve_credentials(name)
    assert f"flux-kontext-credentials/{name}" in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.anyio
async def test_block_name_may_include_the_type():
    await FluxKontextCredentials(api_key="k", account="full").asave("full-name")
    assert (await resolve_credentials(f"{SLUG}/full-name")).account == "full"


@pytest.mark.anyio
async def test_invalid_saved_block_is_reported_without_its_values():
    await FluxKontextCredentials.aregister_type_and_schema()
    async with get_client() as client:
        kind = await client.read_block_type_by_slug(SLUG)
        schema = await client.read_block_schema_by_checksum(
            FluxKontextCredentials._calculate_schema_checksum()
        )
        await client.create_block_document(
            BlockDocumentCreate(
                name="broken",
                data={"api_key": "canary-key", "requests_per_minute": "canary-value"},
                block_type_id=kind.id,
                block_schema_id=schema.id,
            )
        )
    with pytest.raises(ConfigurationError, match="flux-kontext-credentials/broken") as caught:
        await resolve_credentials("broken")
    assert "canary" not in caught.value.message
    assert caught.value.__suppress_context__


@pytest.mark.anyio
async def test_each_client_is_new(account):
    first, second = account.get_client(), account.get_client()
    assert first is not second
    async with first, second:
        assert await first.balance() == await second.balance() > 0


@pytest.mark.anyio
async def test_wrong_key_is_reported_without_showing_it(sandbox):
    block = FluxKontextCredentials(api_key="canary-key", base_url=sandbox.url)
    async with block.get_client() as client:
        with pytest.raises(UnauthorizedError) as caught:
            await client.check()
    assert "canary-key" not in f"{caught.value!r}{caught.value.__cause__!r}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("api_key", ""), ("api_key", "two words"), ("base_url", "ftp://x"), ("base_url", "")],
)
def test_invalid_block_raises_before_anything_is_sent(field, value):
    block = FluxKontextCredentials(**{"api_key": KEY, field: value})
    with pytest.raises(ConfigurationError):
        block.get_client()
