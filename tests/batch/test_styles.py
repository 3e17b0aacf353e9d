"""A batch in several styles, on virtual time."""

import csv
import io

from prefect_flux_kontext.batch.runner import FAILED_ROWS
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.checker import read_all
from tests.chaos.simulation import in_process, simulate

SLOW = SandboxSettings(mean=60, long_edge=16)
QUICK = SandboxSettings(mean=0.5, long_edge=16)
ROWS = [{"id": "cat", "prompt": "a cat"}, {"id": "2024/dog", "prompt": "a dog"}]


def images(env):
    return sorted(name for name in read_all(env.url) if name.endswith(".jpg"))


def failed_rows(env):
    text = read_all(env.url)[FAILED_ROWS].decode()
    return list(csv.DictReader(io.StringIO(text)))


def test_each_image_is_stored_once_in_each_style():
    async def main(env):
        manifest = Manifest(ROWS, styles=["oil", "noir"])
        for _ in range(2):
            summary = await in_process(env, None, list(manifest.rows()))
            assert (summary.rows, summary.stored, env.posts) == (4, 4, 4)
        assert images(env) == [
            "2024/dog/noir.jpg",
            "2024/dog/oil.jpg",
            "cat/noir.jpg",
            "cat/oil.jpg",
        ]
        more = Manifest(ROWS, styles=["oil", "neon", "noir"])
        await in_process(env, None, list(more.rows()))
        assert env.posts == 6

    simulate(main, 1, None, QUICK)


def test_collected_rows_keep_their_names():
    async def main(env):
        manifest = Manifest(ROWS, styles=["oil", "noir"], names="{style}/{id}.{ext}")
        assert await in_process(env, 20, list(manifest.rows())) is None
        assert env.posts == 4
        summary = await in_process(env, None, [], only_collect=True)
        assert summary.stored == 4
        assert images(env) == [
            "noir/2024/dog.jpg",
            "noir/cat.jpg",
            "oil/2024/dog.jpg",
            "oil/cat.jpg",
        ]
        again = await in_process(env, None, list(manifest.rows()))
        assert (again.already_stored, env.posts) == (4, 4)
        assert len(images(env)) == 4

    simulate(main, 1, None, SLOW)


def test_failed_rows_of_a_matrix_can_be_run_again(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("banned: 'nsfw, {{ prompt }}'\n", encoding="utf-8")
    rows = [{"id": "cat", "image": "", "prompt": "{{ mood }} cat", "mood": "calm"}, *ROWS[1:]]

    async def main(env):
        manifest = Manifest(
            rows, styles=["oil", str(own)], names="{style}/{id}.{ext}", output=env.url
        )
        summary = await in_process(env, None, list(manifest.rows()))
        assert (summary.stored, summary.failed) == (2, 2)
        # In the order in which they failed.
        assert {failure.label for failure in summary.failures} == {
            "cat (banned)",
            "2024/dog (banned)",
        }
        failed = failed_rows(env)
        assert {(row["style"], row["output"]) for row in failed} == {
            ("banned", "banned/cat"),
            ("banned", "banned/2024/dog"),
        }
        # Unchanged and without the name template, they are the same rows of the ledger.
        path = tmp_path / "failed.csv"
        path.write_bytes(read_all(env.url)[FAILED_ROWS])
        again = list(Manifest(str(path), styles=str(own)).rows())
        assert {row.name for row in again} == {"banned/cat", "banned/2024/dog"}
        await in_process(env, None, again, retry=True)
        assert env.posts == 4
        # With the style fixed, the rows are paid for and stored under their names.
        own.write_text("banned: 'in ink, {{ prompt }}'\n", encoding="utf-8")
        fixed = list(Manifest(str(path), styles=str(own)).rows())
        summary = await in_process(env, None, fixed, retry=True)
        assert (summary.stored, env.posts) == (2, 6)
        assert "banned/2024/dog.jpg" in images(env)

    simulate(main, 1, None, QUICK)


def test_failed_rows_keep_the_common_prompt():
    rows = [{"id": "cat", "image": "http://references.test/cat.jpg"}]

    async def main(env):
        manifest = Manifest(rows, prompt="nsfw {{ id }}", styles="oil")
        await in_process(env, None, list(manifest.rows()))
        (failed,) = failed_rows(env)
        assert failed["prompt"] == "nsfw {{ id }}"
        (row,) = Manifest([failed]).rows()
        assert [row.key for row in manifest.rows()] == [row.key]

    simulate(main, 1, None, QUICK)


def test_equal_images_of_a_matrix_are_paid_once():
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}]

    async def main(env):
        manifest = Manifest(rows, styles=["oil", "noir"])
        await in_process(env, None, list(manifest.rows()))
        assert env.posts == 2
        assert images(env) == ["a/noir.jpg", "a/oil.jpg", "b/noir.jpg", "b/oil.jpg"]

    simulate(main, 1, None, QUICK)
