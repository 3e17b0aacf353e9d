"""Each benchmark at its smallest, so that none is found broken on the day it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]


def benchmark(*arguments):
    """What a benchmark prints, run as a person would run it."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_limiter_is_simulated():
    output = benchmark("-m", "benchmarks.limiter", "--images", 40, "--only", "steady", "called")
    assert "| steady |" in output
    assert "| called back |" in output


@pytest.mark.parametrize("work", ["batch", "called", "fixed:0.05", "bare"])
def test_a_piece_of_work_is_measured_against_a_sandbox(work):
    (output,) = benchmark("benchmarks/measuring.py", work, 6).splitlines()
    assert '"stored": 6' in output


def test_the_tables_of_the_page_are_made_and_put_between_its_markers(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- begin start -->\nold\n<!-- end start -->\nafter\n")
    benchmark("benchmarks/run.py", "--only", "start", "--page", page)
    output = page.read_text()
    assert output.startswith("before\n<!-- begin start -->\n|")
    assert "| `flux-kontext --help` | 1 |" in output
    assert output.endswith("<!-- end start -->\nafter\n")


def test_a_plan_of_a_manifest_is_measured():
    assert benchmark("benchmarks/plan.py", "--rows", 100, "--kinds", "csv").count("100") >= 1


def test_batches_polled_and_called_back_are_measured_side_by_side():
    output = benchmark("benchmarks/callback_mode.py", "--rows", 4, "--mean", 0.3).splitlines()
    assert ["4 paid" in line for line in output] == [True] * 3


def test_the_receiver_is_measured():
    assert "200" in benchmark("benchmarks/receiver.py", "--rate", 20, "--seconds", 0.5)
