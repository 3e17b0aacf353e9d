"""The flow over one image. Like those over manifests, it is imported from `flows`."""

# Annotations are real objects here, not strings: `serve` pickles a flow with the names that its
# code uses, and strings are none.

from pathlib import Path

from prefect import flow

from prefect_flux_kontext.api.cadence import PollingCadence
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.forms import Account
from prefect_flux_kontext.manifest.rows import problems_of_reference
from prefect_flux_kontext.models import (
    AspectRatio,
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
    StoredImage,
)
from prefect_flux_kontext.outputs import Output, StorageOptions, open_output
from prefect_flux_kontext.references.kinds import located, not_on_the_web
from prefect_flux_kontext.references.resolving import references_of
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.tasks import (
    persist_images,
    submit_generation,
    submit_own_reference,
    wait_for_generation,
)


@flow(name="style-transfer")
async def style_transfer(
    prompt: str,
    output: Output,
    image: str | None = None,
    credentials: Account = None,
    mode: Mode = "pro",
    aspect_ratio: AspectRatio = "16:9",
    output_format: OutputFormat = "jpeg",
    provider: Provider = "auto",
    name: str | None = None,
    cadence: PollingCadence | None = None,
    fit_references: bool = False,
    storage_options: StorageOptions = None,
) -> list[StoredImage]:
    """Restyle one image, or make one from text alone.

    Args:
        prompt: What to make, 1 to 10,000 characters.
        output: Folder or prefix to store to, on any fsspec filesystem; or `block:s3-bucket/NAME`.
        image: The reference image: a URL, an object in a bucket or a local file, which needs a
            staging place; none makes the image from the prompt alone.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        mode: `pro` for higher quality, `max` for balanced quality and speed.
        aspect_ratio: Width to height of the result.
        output_format: Kind of the result.
        provider: How the service routes the task.
        name: File name without extension; none takes the task id.
        cadence: When to ask how the task is doing; none for the environment's cadence.
        fit_references: Shrink a local or private image that is over 10 MB.
        storage_options: The options of the output's filesystem, or `block:aws-credentials/NAME`;
            Prefect keeps them in the clear, so keys belong in a Block.

    Returns:
        What was stored.

    Raises:
        FluxKontextError: What went wrong; see the three tasks.
    """
    folder = str(Path.cwd())
    if image is not None and (problems := problems_of_reference(image, folder)):
        # The service would accept, bill and then fail it.
        raise ConfigurationError(*problems)
    request = GenerationRequest(
        prompt=prompt,
        image_urls=[located(image, folder)] if image else [],
        mode=mode,
        aspect_ratio=aspect_ratio,
        output_format=output_format,
        provider=provider,
    )
    account = await resolve_credentials(credentials)
    output = await open_output(output, storage_options)
    await output.check_writable()
    if not_on_the_web(request.image_urls):
        settings = FluxKontextSettings()
        timeout = (cadence or settings.cadence()).timeout
        references = references_of(settings, timeout=timeout, fit=fit_references)
        submitted = await submit_own_reference(request, references, account)
    else:
        submitted = await submit_generation(request, account)
    result = await wait_for_generation(submitted, account, cadence)
    return await persist_images(result, output, name)
