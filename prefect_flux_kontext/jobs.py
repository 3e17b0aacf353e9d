"""The Block of a generation as a job, by Prefect's convention: trigger, wait, fetch the result."""

from __future__ import annotations

from typing import Any

from prefect.blocks.abstract import JobBlock, JobRun
from pydantic import ConfigDict, Field

from prefect_flux_kontext.credentials import FluxKontextCredentials
from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.models import GenerationRequest, GenerationTask, StoredImage
from prefect_flux_kontext.orchestration.dispatch import dispatched
from prefect_flux_kontext.tasks import persist_images, submit_generation, wait_for_generation

__all__ = ["ImageGeneration", "ImageGenerationRun"]


class ImageGenerationRun(JobRun[list[StoredImage]]):
    """A generation that was triggered. Sync callers call its methods without `await`.

    Attributes:
        task: The task that is paid for.
    """

    def __init__(self, job: ImageGeneration, task: GenerationTask) -> None:
        self.task = task
        self._job = job
        self._result: Any = None

    @dispatched
    async def wait_for_completion(self) -> None:
        """Wait for the task to end, with the errors of `wait_for_generation`."""
        self._result = await wait_for_generation.fn(self.task, self._job.credentials)

    @dispatched
    async def fetch_result(self) -> list[StoredImage]:
        """Store the images and return them.

        Raises:
            FluxKontextError: `wait_for_completion` was not called, or the images cannot be stored:
                see `persist_images`.
        """
        if self._result is None:
            raise FluxKontextError(
                f"Call wait_for_completion() first: task {self.task.task_id} may not have ended.",
                task_id=self.task.task_id,
            )
        return await persist_images.fn(self._result, self._job.output, self._job.name)


class ImageGeneration(JobBlock[list[StoredImage]]):
    """A generation as a job: what to create, and where to store it.

    The output is also the ledger, so the job is paid for once, however often it is triggered.

    Example:
        Create an image, or find the one that is stored already:
        ```python
        from prefect_flux_kontext import ImageGeneration

        job = ImageGeneration.load("BLOCK_NAME")
        run = job.trigger()
        run.wait_for_completion()
        images = run.fetch_result()
        ```
    """

    _block_type_name = "Flux Kontext Image Generation"
    _block_type_slug = "flux-kontext-image-generation"
    _logo_url = FluxKontextCredentials._logo_url  # noqa: SLF001 - the same logo
    _documentation_url = FluxKontextCredentials._documentation_url  # type: ignore[assignment] # noqa: SLF001

    model_config = ConfigDict(extra="forbid")

    credentials: FluxKontextCredentials = Field(description="The account that pays.")
    request: GenerationRequest = Field(description="What to create.")
    output: str = Field(
        description="Folder or prefix for the images and the ledger: a path, an fsspec URL, or "
        "`block:` and the reference of a saved storage Block."
    )
    name: str | None = Field(
        default=None, description="File name without extension. Default: the task id."
    )
    key: str | None = Field(
        default=None, description="Another key pays for the same request once more."
    )

    @dispatched
    async def trigger(self) -> ImageGenerationRun:
        """Submit the generation, unless it is paid for; with the errors of `submit_generation`."""
        task = await submit_generation.fn(self.request, self.credentials, self.output, self.key)
        return ImageGenerationRun(self, task)
