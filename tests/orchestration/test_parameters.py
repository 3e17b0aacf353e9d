"""Storage Blocks as outputs: as an object, by name, and as Prefect's reference."""

import uuid

import pytest
from prefect import get_client
from prefect.blocks.system import Secret
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ParameterTypeError
from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.flow_engine import run_flow

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.flows import (
    collect_batch,
    log_outstanding,
    retry_failed,
    style_transfer,
    style_transfer_batch,
)
from prefect_flux_kontext.orchestration.parameters import open_output
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import QUICK, flush_to_prefect
from tests.orchestration.test_secrets import forms
from tests.support.s3 import s3_server

try:
    import prefect_aws as aws
    from prefect_aws.client_parameters import AwsClientParameters
except ImportError:
    from tests.support import aws_blocks as aws
    from tests.support.aws_blocks import AwsClientParameters

pytestmark = pytest.mark.anyio

SECRET = "canary-of-the-store-7f3a9c51e2"
ROWS = [{"id": "a", "prompt": "oil"}, {"id": "b", "prompt": "nsfw"}]
CADENCE = QUICK.model_dump()


@pytest.fixture(scope="module")
def s3():
    """An S3 server that the environment does not configure."""
    with s3_server(configured=False) as (_, client):
        yield client


@pytest.fixture
def folder(tmp_path):
    """A prefix that no other test uses."""
    return tmp_path.name


@pytest.fixture
def name():
    """A name that no Block of another test has."""
    return f"of-{uuid.uuid4()}"


def make_remote(s3, folder):
    settings = {"endpoint_url": s3.meta.endpoint_url, "key": "testing", "secret": SECRET}
    return RemoteFileSystem(basepath=f"s3://pictures/{folder}", settings=settings)


def make_keys(s3, **fields):
    return aws.AwsCredentials(
        aws_access_key_id="testing",
        aws_secret_access_key=SECRET,
        aws_client_parameters=AwsClientParameters(endpoint_url=s3.meta.endpoint_url),
        **fields,
    )


def list_images(s3, folder):
    found = s3.list_objects_v2(Bucket="pictures", Prefix=f"{folder}/").get("Contents", [])
    names = [entry["Key"].removeprefix(f"{folder}/") for entry in found]
    return {name for name in names if name.endswith(".jpg")}


class TestBatches:
    async def test_all_flows_take_a_block_by_name(self, account, s3, folder, name):
        await make_remote(s3, folder).asave(name)
        output = f"block:remote-file-system/{name}"
        how = {"credentials": account, "cadence": CADENCE}
        summary = await style_transfer_batch(ROWS, output, **how)
        assert (summary.stored, summary.output) == (1, f"s3://pictures/{folder}")
        again = await retry_failed(output, **how)
        assert (again.rows, again.failed) == (1, 1)
        assert (await collect_batch(output, **how)).rows == 0
        (stored,) = await style_transfer("oil", output, name="one", **how)
        assert stored.uri == f"s3://pictures/{folder}/one.jpg"
        assert list_images(s3, folder) == {"a.jpg", "one.jpg"}

    async def test_batch_takes_a_block_object(self, account, tmp_path):
        block = LocalFileSystem(basepath=str(tmp_path / "out"))
        summary = await style_transfer_batch(ROWS[:1], block, credentials=account, cadence=CADENCE)
        assert summary.stored == 1
        assert (tmp_path / "out" / "a.jpg").exists()

    async def test_deployment_stores_a_block_by_reference(self, account, s3, folder, name):
        block = make_remote(s3, folder)
        await block.asave(name)
        await account.asave(name)
        parameters = {"manifest": ROWS[:1], "output": block, "credentials": name}
        deployment = await style_transfer_batch.ato_deployment(
            name, parameters={**parameters, "cadence": CADENCE}
        )
        async with get_client() as client:
            flow_run = await client.create_flow_run_from_deployment(await deployment.apply())
        kept = flow_run.parameters["output"]
        assert kept == {"$ref": {"block_document_id": str(block._block_document_id)}}
        summary = await run_flow(
            style_transfer_batch, flow_run=flow_run, parameters=flow_run.parameters
        )
        assert summary.stored == 1
        assert list_images(s3, folder) == {"a.jpg"}
        run = FlowRun(flow_id=flow_run.flow_id, parameters=flow_run.parameters)
        await log_outstanding(style_transfer_batch, run, None)

    @pytest.mark.parametrize("credentials", ["aws", "minio"])
    async def test_prefect_aws_bucket_is_an_output(self, credentials, account, s3, folder, name):
        keys = make_keys(s3, region_name="eu-north-1")
        if credentials == "minio":
            keys = aws.MinIOCredentials(
                minio_root_user="testing",
                minio_root_password=SECRET,
                aws_client_parameters=keys.aws_client_parameters,
            )
        await keys.asave(name)
        bucket = aws.S3Bucket(bucket_name="pictures", bucket_folder=f"{folder}/", credentials=keys)
        await bucket.asave(name)
        summary = await style_transfer_batch(
            ROWS[:1], f"block:s3-bucket/{name}", credentials=account, cadence=CADENCE
        )
        assert (summary.stored, summary.output) == (1, f"s3://pictures/{folder}")
        assert list_images(s3, folder) == {"a.jpg"}

    async def test_url_output_uses_the_keys_of_a_block(self, account, s3, folder, name):
        await make_keys(s3).asave(name)
        summary = await style_transfer_batch(
            ROWS[:1],
            f"s3://pictures/{folder}",
            credentials=account,
            cadence=CADENCE,
            storage_options=f"block:aws-credentials/{name}",
        )
        assert summary.stored == 1
        assert list_images(s3, folder) == {"a.jpg"}

    async def test_keys_of_a_store_are_not_in_prefect_database(
        self, account, s3, folder, name, prefect_api
    ):
        await make_remote(s3, folder).asave(name)
        output = f"block:remote-file-system/{name}"
        await style_transfer_batch(ROWS, output, credentials=account, cadence=CADENCE)
        flush_to_prefect()
        files = list(prefect_api.home.glob("prefect.db*"))
        recorded = b"".join(path.read_bytes() for path in files)
        assert name.encode() in recorded
        assert not [form for form in forms(SECRET) if form in recorded]


class TestOpenOutput:
    async def test_options_take_precedence_over_the_block(self, tmp_path):
        block = RemoteFileSystem(basepath=f"memory://{tmp_path.name}", settings={"a": 1, "b": 1})
        assert (await open_output(block, {"b": 2})).options == {"a": 1, "b": 2}

    async def test_environment_options_apply_to_paths_and_urls(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FLUX_KONTEXT_STORAGE_OPTIONS", '{"a": 1}')
        assert (await open_output(str(tmp_path))).options == {"a": 1}
        assert (await open_output(tmp_path, {"b": 2})).options == {"b": 2}
        assert (await open_output(LocalFileSystem(basepath=str(tmp_path)))).options == {}

    async def test_open_folder_is_returned(self, tmp_path):
        folder = OutputFolder(tmp_path)
        assert await open_output(folder) is folder

    async def test_aws_block_becomes_s3fs_options(self, s3):
        keys = make_keys(s3, aws_session_token="token", region_name="eu-north-1")
        keys.aws_client_parameters.config = {"max_pool_connections": 5}
        keys.aws_client_parameters.use_ssl = False
        keys.aws_client_parameters.verify = False
        opened = await open_output("s3://pictures/x", keys)
        assert opened.options == {
            "key": "testing",
            "secret": SECRET,
            "token": "token",
            "endpoint_url": s3.meta.endpoint_url,
            "use_ssl": False,
            "config_kwargs": {"max_pool_connections": 5},
            "client_kwargs": {"region_name": "eu-north-1", "verify": False},
        }
        profile = aws.AwsCredentials(profile_name="studio")
        assert (await open_output("memory://x", profile)).options == {"profile": "studio"}

    async def test_role_to_assume_is_refused(self, s3):
        keys = make_keys(s3, assume_role_arn="arn:aws:iam::1:role/x")
        with pytest.raises(ConfigurationError, match="Name a profile that assumes the role"):
            await open_output("s3://pictures/x", keys)

    @pytest.mark.parametrize("slug", ["s3-bucket", "remote-file-system", "local-file-system"])
    async def test_ambiguous_text_is_refused(self, slug, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigurationError, match=f"block:{slug}/x for the Block") as caught:
            await open_output(f"{slug}/x")
        assert f"./{slug}/x for a new folder" in caught.value.message
        assert str(await open_output(f"./{slug}/x")) == f"file://{tmp_path}/{slug}/x"
        (tmp_path / slug / "x").mkdir(parents=True)
        assert str(await open_output(f"{slug}/x")) == f"file://{tmp_path}/{slug}/x"

    @pytest.mark.parametrize(
        "reference",
        ["remote-file-system/missing", "no-such-type/x", "remote-file-system", "", "a/b/c"],
    )
    async def test_missing_output_block_is_named(self, reference):
        with pytest.raises(ConfigurationError, match="cannot be loaded") as caught:
            await open_output(f"block:{reference}")
        assert reference in caught.value.message

    async def test_block_without_a_location_is_refused(self, name):
        await Secret(value=SECRET).asave(name)
        with pytest.raises(ConfigurationError, match="no location to store images in") as caught:
            await open_output(f"block:secret/{name}")
        assert SECRET not in repr(caught.value)
        with pytest.raises(ConfigurationError, match="no keys for a store"):
            await open_output("memory://x", f"block:secret/{name}")

    @pytest.mark.parametrize(
        "wrong",
        [{"output": 7}, {"output": Secret(value="x")}, {"storage_options": "a=b"}],
        ids=["a number", "a Block without a location", "text"],
    )
    async def test_other_types_are_refused_by_the_form(self, wrong, account, tmp_path):
        given = {"output": str(tmp_path), **wrong}
        with pytest.raises(ParameterTypeError, match=r"An output must be|Storage options must be"):
            await style_transfer_batch(ROWS, credentials=account, **given)
