"""Checks of data blocks: each is loaded by the code that reads such files."""

import json

import yaml
from prefect.events import DeploymentTriggerTypes
from pydantic import TypeAdapter

from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow
from prefect_flux_kontext.sandbox.faults.plan import load_plan
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.styles.styles import read_styles


def check_manifest(text, ending, folder):
    """Check that every row of a manifest is valid."""
    path = folder / f"block.{ending}"
    path.write_text(text, encoding="utf-8")
    rows = list(Manifest(str(path), "as a poster", output=str(folder / "none")).rows())
    assert rows
    assert [row.reason for row in rows if isinstance(row, RefusedRow)] == []


def check_yaml(text, folder):
    """Check a plan of faults, triggers of a deployment, or styles."""
    loaded = yaml.safe_load(text)
    path = folder / "block.yaml"
    path.write_text(text, encoding="utf-8")
    if "faults" in loaded:
        load_plan(path, [], 0)
    elif "triggers" in loaded:
        for trigger in loaded["triggers"]:
            TypeAdapter(DeploymentTriggerTypes).validate_python(trigger)
    else:
        assert read_styles(str(path))


def check_storage_options(text):
    """Check storage options, one JSON object a line, as the variable takes them."""
    for line in text.splitlines():
        options = FluxKontextSettings(storage_options=line).fsspec_options()
        assert options == json.loads(line)
