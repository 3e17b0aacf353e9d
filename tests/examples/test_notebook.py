"""The notebook of the examples, run in a real kernel against the sandbox."""

import pytest

from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.examples.playground import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "examples" / "notebook" / "restyle.ipynb"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Run the notebook, and return what each cell with a value shows as HTML."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with (
        running_sandbox(SandboxSettings(mean=0.1, long_edge=128)) as sandbox,
        prefect_server(folder / "prefect") as prefect,
    ):
        environment = {
            **prefect.environment,
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.1",
            "PYTHONPATH": str(ROOT),
        }
        client = nbclient.NotebookClient(notebook, timeout=120)
        client.execute(cwd=str(folder), env=environment)
        paid = sandbox.service.bill()["accepted"]
    assert paid == 2 * 3 + 1 + 1
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = [output.text for output in outputs if output.output_type == "stream"]
    assert "Warning" not in "".join(printed)
    return [
        output.data["text/html"] for output in outputs if output.output_type == "execute_result"
    ]


def test_batch_shows_its_pictures_and_failures(shown):
    assert "4 of 6 rows stored" in shown[0]
    assert "data:image/webp;base64," in shown[0]
    assert "CONTENT_VIOLATION" in shown[0]


def test_results_are_shown_as_a_table(shown):
    assert shown[1].count("<tr>") >= 6


def test_image_shows_itself(shown):
    assert "data:image/webp;base64," in shown[2]


def test_result_shows_before_and_after(shown):
    assert "before" in shown[3]
    assert "after" in shown[3]
