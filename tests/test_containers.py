"""The Dockerfile and the job templates: pinned, without root, and stopped late enough."""

import fnmatch
import json
import re
from pathlib import Path

import pytest
from prefect.client.schemas.actions import WorkPoolCreate

from prefect_flux_kontext.settings import FluxKontextSettings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PREFECT_KILLS_AFTER_SECONDS = 30
KINDS = ("docker", "kubernetes")


def load(kind):
    return json.loads((ROOT / "examples" / "containers" / f"{kind}.json").read_text())


def default_environment(kind):
    return load(kind)["variables"]["properties"]["env"]["default"]


def test_base_image_is_pinned_by_one_digest():
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", bases[0])


def test_image_runs_without_root():
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)", last_stage, re.MULTILINE) == ["1000"]


def test_context_of_the_image_holds_what_is_copied():
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = set()
    for names in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        copied |= set(names.split())
    assert copied == allowed
    assert "*" in lines
    assert all((ROOT / name).exists() for name in copied)
    assert fnmatch.filter(lines, "*__pycache__*")


@pytest.mark.parametrize("kind", KINDS)
def test_prefect_accepts_the_template(kind):
    WorkPoolCreate(name="flux-kontext", type=kind, base_job_template=load(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_template_holds_no_key(kind):
    environment = default_environment(kind)
    secret = {name for name in environment if re.search("KEY|SECRET|TOKEN", name)}
    assert secret == (
        {"FLUX_KONTEXT_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        if kind == "docker"
        else set()
    )
    for name in secret:
        assert environment[name].startswith("{{ prefect.blocks.secret.")


@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_recorded_before_prefect_kills(kind, monkeypatch):
    for name, value in default_environment(kind).items():
        if name == "FLUX_KONTEXT_STOP_TIMEOUT":
            monkeypatch.setenv(name, value)
    assert FluxKontextSettings().stop_timeout < PREFECT_KILLS_AFTER_SECONDS
    assert f"FLUX_KONTEXT_STOP_TIMEOUT={FluxKontextSettings().stop_timeout:g}" in DOCKERFILE


def test_grace_period_is_longer_than_prefects():
    job = load("kubernetes")["job_configuration"]["job_manifest"]["spec"]
    assert job["backoffLimit"] == 0  # Prefect then reschedules an evicted flow run
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > PREFECT_KILLS_AFTER_SECONDS
    assert (
        default_environment("docker")["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    )
