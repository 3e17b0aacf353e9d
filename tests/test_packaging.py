"""What is built and published: the files of the wheel, what it says of itself, what it needs."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

import prefect_flux_kontext
from hatch_build import make_links_absolute

ROOT = Path(__file__).parents[1]
PACKAGE = "prefect_flux_kontext"
VERSION = prefect_flux_kontext.__version__
EXTRAS = {"s3": "s3fs", "parquet": "pyarrow", "zstd": "zstandard"}
"""Each extra for users, and the one module it brings."""

OUR_FILES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / PACKAGE).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that was made of nothing but the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def files(built):
    """The wheel's files by name."""
    with zipfile.ZipFile(built[1]) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


@pytest.fixture(scope="module")
def metadata(files):
    return message_from_bytes(files[f"{PACKAGE}-{VERSION}.dist-info/METADATA"])


def test_the_wheel_holds_the_package_and_nothing_else(files):
    info = f"{PACKAGE}-{VERSION}.dist-info/"
    assert {name for name in files if not name.startswith(info)} == OUR_FILES
    assert {name.removeprefix(info) for name in files if name.startswith(info)} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_what_is_no_python_is_in_the_wheel_too(files):
    data = {name.removeprefix(f"{PACKAGE}/") for name in files if not name.endswith(".py")}
    assert {"py.typed", "styles/builtin.yaml"} <= data
    gallery, photos = PurePosixPath("report/gallery"), PurePosixPath("sandbox/photos")
    kinds = {path.suffix for path in map(PurePosixPath, data) if path.parent == gallery}
    assert kinds == {".html", ".css", ".js"}
    assert sum(PurePosixPath(name).parent == photos for name in data) == 6
    suffixes = {PurePosixPath(name).suffix for name in OUR_FILES}
    assert suffixes <= {".py", ".typed", ".yaml", *kinds, ".md", ".jpg", ".png", ".webp"}


def test_the_sdist_holds_what_the_wheel_is_made_of(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        deployments = sdist.extractfile(sdist.getmember(f"{PACKAGE}-{VERSION}/prefect.yaml"))
        assert deployments.read() == (ROOT / "prefect.yaml").read_bytes()
    beside = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    beside |= {"hatch_build.py", "prefect.yaml"}
    beside |= {*(f"flows/{path.name}" for path in (ROOT / "flows").glob("*.py"))}
    assert names == OUR_FILES | beside


def test_the_metadata_says_for_whom_it_is(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    named = {
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier")
        if line.startswith("Programming Language :: Python :: 3.")
    }
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    tested = re.search(r"python: \[(.+)\]", workflow)
    assert named == set(re.findall(r"[\d.]+", tested[1])) == {f"3.{n}" for n in range(11, 15)}
    # There is no public place of it yet, and a URL that leads nowhere helps nobody.
    named = {url.partition(",")[0] for url in metadata.get_all("Project-URL")}
    assert named == {"Flux Kontext API", "Prefect"}
    assert metadata["Home-page"] is None
    assert set(metadata.get_all("Provides-Extra")) == {*EXTRAS, "dev", "docs", "telemetry"}


def test_links_of_the_package_page_are_absolute(metadata):
    """Those of the README are relative, and a package index has no files beside it."""
    page = metadata.get_payload()
    assert page.startswith((ROOT / "README.md").read_text().partition("\n")[0])
    links = re.findall(r"\]\(([^)]+)\)", page)
    relative = [link for link in links if not link.startswith(("https://", "#"))]
    has_repository = "Repository, " in "\n".join(metadata.get_all("Project-URL"))
    assert relative == [] or not has_repository


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ("[run](docs/start.md#run)", "[run](R/blob/main/docs/start.md#run)"),
        ("[all](examples/)", "[all](R/blob/main/examples/)"),
        ("[![x](docs/x.svg)](docs/x.md)", "[![x](R/raw/main/docs/x.svg)](R/blob/main/docs/x.md)"),
        ('<img src="docs/a.png">', '<img src="R/raw/main/docs/a.png">'),
        ('<a href="docs/a.md">', '<a href="R/blob/main/docs/a.md">'),
        ("[b](#b) [c](https://c.example)", "[b](#b) [c](https://c.example)"),
    ],
)
def test_relative_links_lead_to_the_repository(text, absolute):
    repository = "https://example.com/owner/repo"
    assert make_links_absolute(text, repository) == absolute.replace("R/", f"{repository}/")


def test_entry_points_name_what_is_in_the_wheel(files):
    output = files[f"{PACKAGE}-{VERSION}.dist-info/entry_points.txt"].decode()
    modules = dict(re.findall(r"^(\S+) = ([\w.]+)", output, re.MULTILINE))
    assert modules == {"flux-kontext": f"{PACKAGE}.cli", PACKAGE: f"{PACKAGE}.credentials"}
    for module in modules.values():
        path = module.replace(".", "/")
        assert files.keys() & {f"{path}.py", f"{path}/__init__.py"}


def test_the_version_comes_from_one_place(built, metadata):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version", "readme"]
    assert project["tool"]["hatch"]["version"]["path"] == f"{PACKAGE}/__init__.py"
    assert metadata["Version"] == VERSION
    assert [path.name for path in built] == [
        f"{PACKAGE}-{VERSION}.tar.gz",
        f"{PACKAGE}-{VERSION}-py3-none-any.whl",
    ]
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d\S*)\]", changes, re.MULTILINE)
    assert not released or released[0] == VERSION


def test_the_changelog_is_in_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    first, *released = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    for heading in released:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading)
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert not re.search(r"^####", text, re.MULTILINE)


WITHOUT_EXTRAS = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import prefect_flux_kontext
for module in pkgutil.walk_packages(prefect_flux_kontext.__path__, "prefect_flux_kontext."):
    importlib.import_module(module.name)

from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.manifest.reader import Manifest
for name in ("m.parquet", "m.csv.zst", "s3://bucket/m.csv"):
    try:
        list(Manifest(name).rows())
    except FluxKontextError as error:
        print(error)
"""


def test_without_extras_all_can_be_imported_and_what_is_missing_is_named(tmp_path):
    for name in ("m.parquet", "m.csv.zst"):
        (tmp_path / name).write_bytes(b"whatever")
    missing = {*EXTRAS.values(), "aiobotocore", "boto3", "botocore", "pandas", "polars", "moto"}
    done = subprocess.run(
        [sys.executable, "-c", f"MISSING = {missing!r}\n{WITHOUT_EXTRAS}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout.splitlines()
    assert len(output) == len(EXTRAS)
    for line, extra in zip(output, ("parquet", "zstd", "s3"), strict=True):
        assert f"prefect-flux-kontext[{extra}]" in line or EXTRAS[extra] in line


def test_what_the_package_imports_it_names_as_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}
    assert len(named) == len(project["dependencies"])
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    # Not imported: a safe h11 comes with httpx.
    needed = {modules.get(name, name.replace("-", "_")) for name in named - {"h11"}}
    imported = set()
    for name in OUR_FILES:
        if name.endswith(".py"):
            imported |= set(imports_of(ast.parse((ROOT / name).read_text())))
    outside = imported - sys.stdlib_module_names - {PACKAGE}
    # The API of OpenTelemetry is imported only where its SDK is, which brings it.
    assert outside == needed | (set(EXTRAS.values()) - {"s3fs"}) | {"opentelemetry"}


def test_images_are_opened_only_in_named_formats():
    """Decoders of other formats had holes in older releases of Pillow; none can be reached."""
    opened = [
        (name, {argument.arg for argument in node.keywords})
        for name in OUR_FILES
        if name.endswith(".py")
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert len(opened) >= 6
    assert [name for name, arguments in opened if "formats" not in arguments] == []


def imports_of(tree):
    """The packages that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]
