"""The workflows of .github, as far as they can be judged without running them."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: path for path in (GITHUB / "workflows").iterdir()}
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

each_workflow = pytest.mark.parametrize("name", sorted(WORKFLOWS))


def jobs(name):
    return yaml.safe_load(WORKFLOWS[name].read_text())["jobs"]


def commands(name):
    """What the steps of a workflow run, as one text."""
    steps = (step for job in jobs(name).values() for step in job.get("steps", []))
    return "\n".join(step.get("run", "") for step in steps)


@each_workflow
def test_each_action_is_pinned_by_its_commit_and_says_its_version(name):
    used = re.findall(r"\buses: (\S+)(.*)", WORKFLOWS[name].read_text())
    assert used
    for action, text in used:
        if not action.startswith("./.github/workflows/"):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", text), action
        else:
            assert (ROOT / action).is_file()


@each_workflow
def test_a_workflow_may_do_nothing_and_each_job_only_what_it_says(name):
    assert yaml.safe_load(WORKFLOWS[name].read_text())["permissions"] == {}
    for job in jobs(name).values():
        may_write = {right for right, how in job["permissions"].items() if how != "read"}
        assert may_write <= ({"id-token", "attestations"} if name == "release" else set())
        assert "uses" in job or job["timeout-minutes"] <= 60
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


@each_workflow
def test_no_text_that_a_stranger_writes_is_put_into_a_command(name):
    assert "${{" not in commands(name)


@pytest.mark.parametrize("path", [".ci/run", "CONTRIBUTING.md", "README.md", *WORKFLOWS])
def test_what_is_made_can_be_made(path):
    text = commands(path) if path in WORKFLOWS else (ROOT / path).read_text()
    assert set(re.findall(r"^\s*(?:\$ )?make ([a-z]+)", text, re.MULTILINE)) <= TARGETS
    for script in re.findall(r"\.ci/\w+", text):
        assert (ROOT / script).stat().st_mode & 0o111


def test_the_check_of_a_change_lints_builds_the_docs_and_tests():
    made = set(re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert made == {"check", "docs", "test"}
    assert ".ci/run" in commands("test")


def test_lowest_newest_and_pinned_versions_are_tested():
    steps = jobs("test")["others"]["steps"]
    installs = {each["if"]: each["run"] for each in steps if "uv pip" in each.get("run", "")}
    sets = [each["set"] for each in jobs("test")["others"]["strategy"]["matrix"]["include"]]
    assert list(installs) == [f"matrix.set == '{name}'" for name in sets]
    lowest, older, newest = installs.values()
    assert "--resolution lowest-direct" in lowest
    assert "'prefect<3.9'" in older
    assert newest == "uv pip install --system --editable '.[dev]'"
    # FastAPI is bound only where Prefect 3.8 needs it.
    assert ["fastapi<0.151" in text for text in (lowest, older, newest)] == [True, True, False]
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^prefect==3\.9\.", pinned, re.MULTILINE)


def test_the_wheel_is_tried_where_there_is_nothing_else_and_what_is_pinned_is_audited():
    text = commands("test")
    assert re.search(r"pip\" install .*dist/\*\.whl", text)
    assert "flux-kontext demo" in text
    assert "pip_audit --requirement constraints.txt" in text


def test_only_what_was_tested_and_attested_is_published():
    release = jobs("release")
    assert release["publish"]["needs"] == "build"
    assert release["build"]["needs"] == "test"
    assert release["test"]["uses"] == "./.github/workflows/test.yml"


def test_tools_of_the_signing_job_are_pinned():
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    # twine with what it needs, and the build with its backend.
    assert {"build", "hatchling", "twine", "keyring", "nh3", "readme_renderer", "id"} <= pinned


def test_templates_and_dependabot_can_be_read():
    forms = [yaml.safe_load(path.read_text()) for path in (GITHUB / "ISSUE_TEMPLATE").iterdir()]
    assert sum("body" in form for form in forms) == 2
    for form in forms:
        for part in form.get("body", []):
            assert part["attributes"]
    kinds = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    assert {kind["package-ecosystem"] for kind in kinds} == {"github-actions", "pip"}
