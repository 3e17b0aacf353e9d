"""The public names of the package, and the import without Prefect."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prefect_flux_kontext


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_exported_names_can_be_imported():
    for name in prefect_flux_kontext.__all__:
        value = getattr(prefect_flux_kontext, name)
        assert getattr(value, "__name__", None) == name or callable(value)
    assert prefect_flux_kontext.__all__ == sorted(prefect_flux_kontext.__all__)
    assert set(dir(prefect_flux_kontext)) == {*prefect_flux_kontext.__all__, "__version__"}


def test_exported_names_have_one_module():
    names = [name for group in prefect_flux_kontext._MODULES.values() for name in group]
    assert sorted(names) == prefect_flux_kontext.__all__


def test_documented_names_are_exported():
    assert set(prefect_flux_kontext.__all__) >= {
        "BatchSummary",
        "FailurePolicy",
        "FluxKontextClient",
        "FluxKontextCredentials",
        "GenerationRequest",
        "GenerationResult",
        "GenerationTask",
        "ImageGeneration",
        "PollingCadence",
        "StoredImage",
        "announce_manifest",
        "collect_batch",
        "create_receiver",
        "emit_manifest_arrived",
        "persist_images",
        "resume_suspended",
        "suspend_until_done",
        "retry_failed",
        "style_transfer",
        "style_transfer_batch",
        "submit_generation",
        "wait_for_generation",
    }


def test_docs_and_examples_import_public_names_only():
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("examples/**/*")]
    modules = {
        module
        for page in pages
        if page.suffix in {".md", ".py"}
        for module in re.findall(
            r"^(?:from|import) (prefect_flux_kontext[\w.]*)", page.read_text(), re.MULTILINE
        )
    }
    # The playground starts the sandbox and a Prefect server.
    sandbox = {".sandbox.server", ".sandbox.settings", ".cli.prefect_server"}
    public = {"", ".flows", ".errors", *sandbox}
    assert modules == {f"prefect_flux_kontext{name}" for name in public}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = prefect_flux_kontext.no_such_name
    with pytest.raises(ImportError):
        importlib.import_module("prefect_flux_kontext.no_such_name")


def test_client_is_imported_without_prefect():
    done = run_python(
        "import sys, prefect_flux_kontext as p\n"
        "p.FluxKontextClient, p.GenerationRequest, p.PollingCadence\n"
        "sys.exit('prefect' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["", ".cli", ".flows", ".tasks"])
def test_windows_is_refused_before_anything_else(module):
    done = run_python(f"import sys; sys.platform = 'win32'; import prefect_flux_kontext{module}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: prefect-flux-kontext needs Linux or macOS: on Windows, run it in WSL."
    )
