"""A folder, a prefix or a glob of images is a manifest: sorted, and never of our own results."""

import subprocess
import sys

import fsspec
import pytest

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER
from prefect_flux_kontext.manifest import directory as folder
from prefect_flux_kontext.manifest.directory import find_image_folder
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import Row
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.references.staging import Staging
from tests.support.pictures import picture
from tests.support.plans import build_plan
from tests.support.s3 import s3_server

NAMES = [
    "b.JPG",
    "a.jpg",
    "2024/summer/sea.webp",
    "2024/new.jpeg",
    "10/x.png",
    "notes.txt",
    "2024/film.mp4",
    ".hidden.jpg",
    ".cache/a.jpg",
    "out/a.jpg",
    "_ledger/x.jpg",
]
IDS = ["a", "b", "10/x", "2024/new", "2024/summer/sea"]


@pytest.fixture(scope="module")
def s3():
    with s3_server() as (bucket, client):
        yield bucket, client


@pytest.fixture(params=["local", "file", "memory", "s3"])
def photos(request, tmp_path):
    """The URL of a folder of photos, on each kind of filesystem."""
    name = f"{tmp_path.name}/photos"
    url = {"local": str(tmp_path / "photos"), "file": f"file://{tmp_path}/photos"}.get(
        request.param, f"memory://{name}"
    )
    if request.param == "s3":
        url = f"{request.getfixturevalue('s3')[0]}/{name}"
    put(url, *NAMES)
    return url


@pytest.fixture
def local(tmp_path):
    """Make a local folder of files by their names."""

    def make(*names):
        put(str(tmp_path), *names)
        return str(tmp_path)

    return make


def put(url, *names, content=None):
    fs, root = fsspec.url_to_fs(url)
    for name in names:
        path = f"{root}/{name}"
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path, content or name.encode())


def lines(url, output=None):
    return list(find_image_folder(url, output).lines())


def ids(url, output=None):
    return [line.cells["id"] for line in lines(url, output)]


def problem(url, **given):
    with pytest.raises(ManifestError) as caught:
        list(Manifest(url, **given).rows())
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.message


def test_the_images_of_a_folder_are_lines_sorted_within_their_folders(photos):
    for url in (photos, f"{photos}/"):
        found = lines(url, f"{photos}/out")
        assert [line.cells["id"] for line in found] == IDS
        assert [line.number for line in found] == [1, 2, 3, 4, 5]
        assert found[4].cells["file"] == "sea.webp"
        assert found[4].cells["folder"] == "2024/summer"
        assert found[0].cells["folder"] == ""
        for line in found:
            with fsspec.open(line.cells["image"], "rb") as file:
                assert file.read().decode().endswith(line.cells["file"])


def test_an_image_is_told_by_its_url_or_its_absolute_local_path(photos):
    image = lines(photos)[0].cells["image"]
    fs, path = fsspec.url_to_fs(f"{photos}/a.jpg")
    assert image == (path if "file" in fs.protocol else fs.unstrip_protocol(path))


def test_a_folder_is_told_from_a_file_without_a_slash_at_its_end(local):
    path = local("a.jpg", "m.csv")
    assert find_image_folder(path, None) is not None
    assert find_image_folder(f"{path}/m.csv", None) is None
    assert find_image_folder(f"{path}/a.jpg", None) is None
    for url in ("https://a.test/x*?y/", "http://a.test/", "zip://*::m.zip", ""):
        assert find_image_folder(url, None) is None


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.jpg", ["a"]),
        ("*", ["a", "b"]),
        ("[ab].*", ["a", "b"]),
        ("?.JPG", ["b"]),
        ("*/*", ["10/x", "2024/new"]),
        ("2024/*", ["new"]),
        ("20*/*.jpeg", ["2024/new"]),
        ("**/*.webp", ["2024/summer/sea"]),
        ("2024/**", ["new", "summer/sea"]),
    ],
)
def test_a_glob_takes_what_it_matches_below_the_folder_that_it_begins_in(photos, glob, found):
    assert ids(f"{photos}/{glob}", f"{photos}/out") == found


def test_a_file_whose_name_looks_like_a_glob_is_that_file(local):
    path = local("a[1].csv")
    assert find_image_folder(f"{path}/a[1].csv", None) is None


def test_a_glob_looks_no_deeper_than_it_can_match(local, monkeypatch):
    path = local("a.jpg", "1/2/3/x.jpg")
    listed = []
    found = find_image_folder(f"{path}/*/*.jpg", None)
    list_one = found.fs.ls
    monkeypatch.setattr(found.fs, "ls", lambda at, **how: listed.append(at) or list_one(at, **how))
    with pytest.raises(ManifestError):
        list(found.lines())
    assert listed == [path, f"{path}/1"]


def test_images_that_differ_in_extension_only_are_told_apart_by_it(local):
    below = ("cat.jpg", "cat.png", "dog.jpg", "dog-png.jpg", "dog.png")
    path = local(*below, "x/Bird.jpg", "x/bird.webp")
    assert ids(path) == [
        "cat-jpg",
        "cat-png",
        "dog-png-jpg",
        "dog-jpg",
        "dog-png",
        "x/Bird-jpg",
        "x/bird-webp",
    ]
    assert all(isinstance(row, Row) for row in Manifest(path, styles="oil").rows())


def test_our_own_results_are_never_taken_for_new_images(local):
    path = local("a.jpg", "out/a.jpg", "out/deep/b.jpg", f"{LEDGER_FOLDER}/c.jpg", "other/d.jpg")
    assert ids(path, f"{path}/out") == ["a", "other/d"]
    assert ids(path, f"file://{path}/out/") == ["a", "other/d"]
    assert ids(path, "memory://out") == ["a", "other/d", "out/a", "out/deep/b"]


def test_an_output_that_holds_the_images_is_refused(local):
    path = local("in/a.jpg")
    for output in (path, f"{path}/in", f"file://{path}/in/"):
        told = problem(f"{path}/in", output=output, styles="oil")
        assert "the next run would pay for its own results" in told
    assert find_image_folder(f"{path}/in", f"{path}/i").output == f"{path}/i"


def test_a_link_to_an_image_is_one_and_a_link_to_a_folder_leads_nowhere(local, tmp_path):
    path = local("photos/a.jpg")
    (tmp_path / "photos" / "b.jpg").symlink_to(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "gone.jpg").symlink_to(tmp_path / "none")
    (tmp_path / "photos" / "round").symlink_to(tmp_path / "photos")
    assert ids(f"{path}/photos") == ["a", "b"]


def test_files_that_are_no_images_by_name_are_counted_in_the_plan(local):
    path = local("a.jpg", "b.txt", "x/c.csv", "x/d.jpg.part")
    put(path, "a.jpg", content=picture())
    staging = Staging(f"{path}/.staged", "https://staged.example.com")
    plan = build_plan(Manifest(path, styles="oil"), references=References(staging))
    assert (plan.rows, plan.left_out, plan.to_pay) == (1, 3, 1)
    assert "        3  non-image files skipped" in str(plan)
    assert "skipped" not in str(build_plan(Manifest([{"prompt": "x"}])))


def test_a_folder_without_images_is_told_with_what_it_has(local):
    path = local("m.txt")
    assert "There are no images at" in problem(path, styles="oil")
    assert "only 1 other files" in problem(path, styles="oil")
    assert "There are no images at" in problem(f"{path}/*.jpg", prompt="x")
    assert "There is no manifest at" in problem(f"{path}/none/", prompt="x")


def test_images_alone_need_a_prompt_or_styles(local):
    path = local("a.jpg")
    assert "give --prompt or --style" in problem(path)
    assert "which has no columns" in problem(path, prompt="x", columns={"image": "url"})


def test_each_image_is_made_in_each_style_under_its_folder(local):
    path = local("a.jpg", "2024/b.png")
    made = list(Manifest(path, "{{ folder|default('top') }}", styles=["oil", "noir"]).rows())
    assert all(isinstance(row, Row) for row in made)
    assert [row.name for row in made] == ["a/oil", "a/noir", "2024/b/oil", "2024/b/noir"]
    assert [row.request.prompt.splitlines()[-1] for row in made] == ["top", "top", "2024", "2024"]


def test_only_new_images_have_new_keys(local):
    path = local("a.jpg", "b.jpg")
    manifest = Manifest(path, styles="oil")
    before = {row.key for row in manifest.rows()}
    put(path, "0.jpg", "sub/a.jpg")
    after = {row.key for row in manifest.rows()}
    assert before < after
    assert len(after - before) == 2


def test_an_object_that_has_changed_has_another_version_and_a_local_file_none(s3):
    bucket, client = s3
    for body in (b"one", b"two"):
        client.put_object(Bucket="pictures", Key="changing/a.jpg", Body=b"one")
        client.put_object(Bucket="pictures", Key="changing/b.jpg", Body=body)
        made = list(Manifest(f"{bucket}/changing/", "x").rows())
        versions = [row.version for row in made]
        assert all(version and '"' not in version for version in versions)
        assert (versions[0] == versions[1]) == (body == b"one")


def test_a_local_file_has_no_version(local):
    (row,) = Manifest(local("a.jpg"), "x").rows()
    assert row.version is None


def test_listings_are_not_remembered(s3):
    bucket, client = s3
    client.put_object(Bucket="pictures", Key="growing/a.jpg", Body=b"a")
    found = find_image_folder(f"{bucket}/growing/", None)
    assert len(list(found.lines())) == 1
    client.put_object(Bucket="pictures", Key="growing/b.jpg", Body=b"b")
    assert len(list(found.lines())) == 2


def test_a_prefix_that_may_not_be_listed_is_a_manifest_error(s3):
    assert "There is no manifest at s3://no-bucket/x/" in problem("s3://no-bucket/x/", prompt="x")


COUNT = """
import resource, sys
from prefect_flux_kontext.manifest.directory import ImageFolder

class Listing:
    protocol = "many"
    def ls(self, path, detail):
        at = path.removeprefix("root").strip("/")
        if not at:
            return [{"name": f"root/{n}", "type": "directory"} for n in range(int(sys.argv[1]))]
        return [{"name": f"{path}/{n}.jpg", "type": "file"} for n in range(500)]
    def invalidate_cache(self):
        pass
    def unstrip_protocol(self, path):
        return "many://" + path

number = sum(1 for _ in ImageFolder("many://root", Listing(), "root", None, 64, None).lines())
print(number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_hundred_thousand_images_are_read_folder_by_folder():
    told = []
    for folders in (2, 200):
        ran = subprocess.run(
            [sys.executable, "-c", COUNT, str(folders)], capture_output=True, text=True, check=True
        )
        told.append(list(map(int, ran.stdout.split())))
    assert [number for number, _ in told] == [1_000, 100_000]
    # Held whole, their lines take some 60 MB.
    assert (told[1][1] - told[0][1]) * 1024 < 10e6


def test_no_folder_is_looked_into_without_end(local):
    path = local("/".join(["d"] * (folder._DEEPEST + 1)) + "/x.jpg", "a.jpg")
    assert ids(path) == ["a"]
