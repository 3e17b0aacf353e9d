"""What can be imported, and that only the edge imports Prefect."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import prefect_flux_kontext

EDGE = (
    "artifacts",
    "automations",
    "cancellation",
    "cli",
    "credentials",
    "events",
    "flows",
    "forms",
    "logs",
    "outputs",
    "parts",
    "plans",
    "receiving",
    "running",
    "single",
    "suspending",
    "tasks",
)
"""The modules that may import Prefect."""

CORE = sorted(
    module.name
    for module in pkgutil.walk_packages(
        prefect_flux_kontext.__path__, prefix="prefect_flux_kontext."
    )
    if module.name.split(".")[1] not in EDGE
)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_every_exported_name_can_be_imported():
    for name in prefect_flux_kontext.__all__:
        value = getattr(prefect_flux_kontext, name)
        assert getattr(value, "__name__", None) == name or callable(value)
    assert prefect_flux_kontext.__all__ == sorted(prefect_flux_kontext.__all__)
    assert set(dir(prefect_flux_kontext)) == {*prefect_flux_kontext.__all__, "__version__"}


def test_every_exported_name_has_one_home():
    homes = [name for names in prefect_flux_kontext._HOMES.values() for name in names]
    assert sorted(homes) == prefect_flux_kontext.__all__


def test_the_promised_names_are_exported():
    assert set(prefect_flux_kontext.__all__) >= {
        "FluxKontextClient",
        "FluxKontextCredentials",
        "GenerationRequest",
        "GenerationResult",
        "GenerationTask",
        "PollingCadence",
        "StoredImage",
        "persist_images",
        "submit_generation",
        "wait_for_generation",
    }


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = prefect_flux_kontext.nothing_of_the_kind
    with pytest.raises(ImportError):
        importlib.import_module("prefect_flux_kontext.nothing_of_the_kind")


def test_the_client_starts_without_prefect():
    done = run_python(
        "import sys, prefect_flux_kontext as p\n"
        "p.FluxKontextClient, p.GenerationRequest, p.PollingCadence\n"
        "sys.exit('prefect' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_no_module_below_the_edge_imports_prefect():
    assert len(CORE) > 20
    done = run_python(
        "import importlib, sys\n"
        f"for name in {CORE!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'prefect' in sys.modules:\n"
        "        sys.exit(f'{name} imports prefect')"
    )
    assert done.returncode == 0, done.stderr
