"""A folder, prefix or glob of images is a manifest: sorted, and without the batch's own output."""

import subprocess
import sys

import fsspec
import pytest

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER
from prefect_flux_kontext.manifest import directory
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
    """Return the URL of a folder of photos on each kind of filesystem."""
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
    """Return a function that creates named files in a local folder and returns its path."""

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
    return list(find_image_folder(url, output).read_lines())


def ids(url, output=None):
    return [line.cells["id"] for line in lines(url, output)]


def problem(url, **given):
    with pytest.raises(ManifestError) as caught:
        list(Manifest(url, **given).rows())
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.message


def test_images_are_sorted_within_their_folders(photos):
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


def test_image_cell_is_a_url_or_an_absolute_path(photos):
    image = lines(photos)[0].cells["image"]
    fs, path = fsspec.url_to_fs(f"{photos}/a.jpg")
    assert image == (path if "file" in fs.protocol else fs.unstrip_protocol(path))


def test_folder_is_recognized_without_a_final_slash(local):
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
def test_glob_selects_the_images_it_matches(photos, glob, found):
    assert ids(f"{photos}/{glob}", f"{photos}/out") == found


def test_existing_file_with_glob_characters_is_a_file(local):
    path = local("a[1].csv")
    assert find_image_folder(f"{path}/a[1].csv", None) is None


def test_glob_lists_no_deeper_than_it_can_match(local, monkeypatch):
    path = local("a.jpg", "1/2/3/x.jpg")
    listed = []
    found = find_image_folder(f"{path}/*/*.jpg", None)
    ls = found.fs.ls
    monkeypatch.setattr(
        found.fs, "ls", lambda path, **options: listed.append(path) or ls(path, **options)
    )
    with pytest.raises(ManifestError):
        list(found.read_lines())
    assert listed == [path, f"{path}/1"]


def test_ids_include_the_extension_if_names_collide(local):
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


def test_output_and_ledger_are_skipped(local):
    path = local("a.jpg", "out/a.jpg", "out/deep/b.jpg", f"{LEDGER_FOLDER}/c.jpg", "other/d.jpg")
    assert ids(path, f"{path}/out") == ["a", "other/d"]
    assert ids(path, f"file://{path}/out/") == ["a", "other/d"]
    assert ids(path, "memory://out") == ["a", "other/d", "out/a", "out/deep/b"]


def test_output_that_contains_the_images_is_refused(local):
    path = local("in/a.jpg")
    for output in (path, f"{path}/in", f"file://{path}/in/"):
        expected = problem(f"{path}/in", output=output, styles="oil")
        assert "the next run would pay for its own results" in expected
    assert find_image_folder(f"{path}/in", f"{path}/i").output == f"{path}/i"


def test_links_are_followed_to_images_only(local, tmp_path):
    path = local("photos/a.jpg")
    (tmp_path / "photos" / "b.jpg").symlink_to(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "gone.jpg").symlink_to(tmp_path / "none")
    (tmp_path / "photos" / "round").symlink_to(tmp_path / "photos")
    assert ids(f"{path}/photos") == ["a", "b"]


def test_plan_counts_files_that_are_not_images(local):
    path = local("a.jpg", "b.txt", "x/c.csv", "x/d.jpg.part")
    put(path, "a.jpg", content=picture())
    staging = Staging(f"{path}/.staged", "https://staged.example.com")
    plan = build_plan(Manifest(path, styles="oil"), references=References(staging))
    assert (plan.rows, plan.skipped_files, plan.to_pay) == (1, 3, 1)
    assert "        3  non-image files skipped" in str(plan)
    assert "skipped" not in str(build_plan(Manifest([{"prompt": "x"}])))


def test_folder_without_images_is_refused(local):
    path = local("m.txt")
    assert "There are no images at" in problem(path, styles="oil")
    assert "(1 other file)" in problem(path, styles="oil")
    assert "There are no images at" in problem(f"{path}/*.jpg", prompt="x")
    assert "There is no manifest at" in problem(f"{path}/none/", prompt="x")


def test_images_alone_need_a_prompt_or_styles(local):
    path = local("a.jpg")
    assert "give --prompt or --style" in problem(path)
    assert "which has no columns" in problem(path, prompt="x", columns={"image": "url"})


def test_each_image_is_made_in_each_style(local):
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


def test_changed_object_has_another_version(s3):
    bucket, client = s3
    for body in (b"one", b"two"):
        client.put_object(Bucket="pictures", Key="changing/a.jpg", Body=b"one")
        client.put_object(Bucket="pictures", Key="changing/b.jpg", Body=body)
        made = list(Manifest(f"{bucket}/changing/", "x").rows())
        versions = [row.version for row in made]
        assert all(version and '"' not in version for version in versions)
        assert (versions[0] == versions[1]) == (body == b"one")


def test_local_file_has_no_version(local):
    (row,) = Manifest(local("a.jpg"), "x").rows()
    assert row.version is None


def test_listings_are_not_cached(s3):
    bucket, client = s3
    client.put_object(Bucket="pictures", Key="growing/a.jpg", Body=b"a")
    found = find_image_folder(f"{bucket}/growing/", None)
    assert len(list(found.read_lines())) == 1
    client.put_object(Bucket="pictures", Key="growing/b.jpg", Body=b"b")
    assert len(list(found.read_lines())) == 2


def test_unlistable_prefix_is_a_manifest_error(s3):
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

number = sum(1 for _ in ImageFolder("many://root", Listing(), "root", None, 64, None).read_lines())
print(number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_many_images_are_read_in_little_memory():
    measured = []
    for folders in (2, 200):
        ran = subprocess.run(
            [sys.executable, "-c", COUNT, str(folders)], capture_output=True, text=True, check=True
        )
        measured.append(list(map(int, ran.stdout.split())))
    assert [number for number, _ in measured] == [1_000, 100_000]
    # All lines together take about 60 MB.
    assert (measured[1][1] - measured[0][1]) * 1024 < 10e6


def test_depth_of_folders_is_limited(local):
    path = local("/".join(["d"] * (directory._MAX_DEPTH_FOLDERS + 1)) + "/x.jpg", "a.jpg")
    assert ids(path) == ["a"]


OWN_RESULTS = ("out/a.jpg", "out/_ledger/rows/1.json", "a.jpg", "b.jpg")


@pytest.mark.parametrize("output", ["out", "./out/", "../photos/out", "x/../out", "link", "OUT/"])
def test_output_inside_under_another_spelling_is_left_out(tmp_path, monkeypatch, output):
    """Otherwise each run would pay for the results of the one before."""
    photos = tmp_path / "photos"
    put(str(photos), *OWN_RESULTS)
    (photos / "out" / "_ledger").rename(photos / "aside")  # only the path tells
    (photos / "aside").rename(tmp_path / "aside")
    (photos / "OUT").symlink_to(photos / "out")
    (tmp_path / "link").symlink_to(photos / "out")
    monkeypatch.chdir(tmp_path if output == "link" else photos)
    assert ids(str(photos), output) == ["a", "b"]
    assert ids(".", output) == ["a", "b"] if output != "link" else True


@pytest.mark.parametrize("manifest", ["link", "../photos", "."])
def test_manifest_under_another_spelling_leaves_the_output_out(tmp_path, monkeypatch, manifest):
    photos = tmp_path / "photos"
    put(str(photos), *OWN_RESULTS)
    (photos / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    assert ids(manifest, str(photos / "out")) == ["a", "b"]


def test_output_around_the_images_through_a_link_is_refused(tmp_path):
    put(str(tmp_path / "out"), "in/a.jpg")
    (tmp_path / "photos").symlink_to(tmp_path / "out" / "in")
    message = problem(str(tmp_path / "photos"), output=str(tmp_path / "out"), styles="oil")
    assert "choose another output" in message


def test_outputs_of_other_batches_are_left_out_and_counted(photos):
    put(photos, *OWN_RESULTS, "deep/er/out/c.jpg", "deep/er/out/_ledger/format.json")
    folder = find_image_folder(photos, f"{photos}/elsewhere")
    found = [line.cells["id"] for line in folder.read_lines()]
    assert "a" in found
    assert not [name for name in found if "out/" in name]
    assert folder.skipped.total() >= 2


def test_folder_that_is_an_earlier_output_may_be_a_manifest(photos):
    put(photos, "_ledger/rows/1.json", "a.jpg")
    assert "a" in ids(photos, f"{photos}/next")


def test_key_with_an_empty_folder_is_counted(s3, tmp_path):
    """fsspec cannot list such a folder."""
    bucket, client = s3
    for key in ("a.jpg", "#b.jpg", "sea//c.jpg", "/d.jpg"):
        client.put_object(Bucket="pictures", Key=f"{tmp_path.name}/{key}", Body=b"x")
    manifest = Manifest(f"{bucket}/{tmp_path.name}/", prompt="oil")
    assert [row.id for row in manifest.rows()] == ["#b", "a"]
    assert manifest.skipped == {"files in folders without a name": 2}
