"""The flow over one image. Like those over manifests, it is imported from `flows`."""

# Annotations are real objects here, not strings: `serve` pickles a flow with the names that its
# code uses, and strings are none.

from prefect import flow

from prefect_flux_kontext.api.cadence import PollingCadence
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.forms import Account, Output
from prefect_flux_kontext.manifest.rows import problems_of_reference
from prefect_flux_kontext.models import (
    AspectRatio,
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
    StoredImage,
)
from prefect_flux_kontext.storage import OutputFolder
from prefect_flux_kontext.tasks import persist_images, submit_generation, wait_for_generation


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
) -> list[StoredImage]:
    """Restyle one image, or make one from text alone.

    Args:
        prompt: What to make, 1 to 10,000 characters.
        output: Folder or prefix to store to, on any fsspec filesystem.
        image: URL of the reference image; none makes the image from the prompt alone.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        mode: `pro` for higher quality, `max` for balanced quality and speed.
        aspect_ratio: Width to height of the result.
        output_format: Kind of the result.
        provider: How the service routes the task.
        name: File name without extension; none takes the task id.
        cadence: When to ask how the task is doing; none for the environment's cadence.

    Returns:
        What was stored.

    Raises:
        FluxKontextError: What went wrong; see the three tasks.
    """
    if image is not None and (problems := problems_of_reference(image)):
        # The service would accept, bill and then fail it.
        raise ConfigurationError(*problems)
    request = GenerationRequest(
        prompt=prompt,
        image_urls=[image] if image else [],
        mode=mode,
        aspect_ratio=aspect_ratio,
        output_format=output_format,
        provider=provider,
    )
    account = await resolve_credentials(credentials)
    await OutputFolder(output).check_writable()
    submitted = await submit_generation(request, account)
    result = await wait_for_generation(submitted, account, cadence)
    return await persist_images(result, output, name)
