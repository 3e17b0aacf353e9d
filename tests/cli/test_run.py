"""`flux-kontext run`: exit status, output streams, progress, and Ctrl-C."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.cli.run import show_progress

KEY = "key-of-the-tests"
COMMAND = Path(sys.executable).parent / "flux-kontext"


@pytest.fixture
def manifest(tmp_path):
    def write(*prompts):
        path = tmp_path / "manifest.csv"
        lines = [f"row-{number},{prompt}" for number, prompt in enumerate(prompts)]
        path.write_text("\n".join(["id,prompt", *lines]))
        return str(path)

    return write


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


def test_all_stored_exits_0(sandbox, manifest, output, capsys, tmp_path):
    assert main(["run", manifest("a lighthouse", "a harbour"), output]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 rows stored" in printed.out
    assert str(tmp_path / "out") in printed.out
    assert printed.out.endswith(f"{(tmp_path / 'out' / 'gallery.html').as_uri()}\n")
    assert printed.err == ""
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {"row-0.jpg", "row-1.jpg"}


def test_log_format_json_logs_one_object_a_line(sandbox, manifest, output):
    arguments = ["run", manifest("a lighthouse", "nsfw"), output, "--log-format", "json"]
    command = [sys.executable, "-m", "prefect_flux_kontext", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(set(line) >= {"time", "level", "logger", "message"} for line in lines)
    assert {line["level"] for line in lines} == {"INFO"}


def test_error_is_logged_as_json(sandbox, tmp_path, output):
    arguments = ["run", str(tmp_path / "absent.csv"), output, "--log-format", "json"]
    command = [sys.executable, "-m", "prefect_flux_kontext", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert line["level"] == "ERROR"
    assert "absent.csv" in line["message"]


def test_failed_rows_exit_1_and_are_listed(sandbox, manifest, output, capsys):
    """Each failed row is printed with its line."""
    assert main(["run", manifest("a lighthouse", "nsfw", ""), output, "--skip-invalid"]) == 1
    out = capsys.readouterr().out
    assert "1 of 3 rows stored; 2 failed" in out
    assert "line 3, row-1: " in out
    assert "CONTENT_VIOLATION" in out
    assert "line 4, row-2: " in out


def test_prompt_option_is_for_all_rows(sandbox, tmp_path, output, capsys):
    path = tmp_path / "m.csv"
    path.write_text(f"id,image\na,{sandbox.url}/references/rocket.jpg\n")
    assert main(["run", str(path), output, "--prompt", "as watercolour"]) == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["{m}", "{o}"], {"FLUX_KONTEXT_API_KEY": ""}, "No API key: set FLUX_KONTEXT_API_KEY"),
        (["{m}", "{o}"], {"FLUX_KONTEXT_API_KEY": "wrong"}, "Check the API key"),
        (["{m}", "{o}"], {"FLUX_KONTEXT_BASE_URL": "http://127.0.0.1:1"}, "Could not connect"),
        (["{m}", "{o}"], {"FLUX_KONTEXT_BASE_URL": "nonsense"}, "FLUX_KONTEXT_BASE_URL"),
        (["{m}", "{o}"], {"FLUX_KONTEXT_POLL_INTERVAL": "soon"}, "FLUX_KONTEXT_POLL_INTERVAL"),
        (["{m}", "{o}"], {"FLUX_KONTEXT_CONCURRENT_TASKS": "0"}, "CONCURRENT_TASKS"),
        (["/none.csv", "{o}"], {}, "There is no manifest at /none.csv"),
        (["{m}", "{m}"], {}, "cannot be written to"),
        (["{m}", "nope://x"], {}, "Protocol not known"),
    ],
)
def test_run_that_cannot_start_exits_2(
    arguments, environment, message, sandbox, manifest, output, capsys, monkeypatch
):
    """It prints one line to stderr and pays nothing."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = manifest("a lighthouse")
    assert main(["run", *(text.format(m=path, o=output) for text in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" or printed.out.endswith("takes 30 s\n"), "prints more than the plan"
    assert printed.err.startswith("flux-kontext: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert sandbox.service.bill()["accepted"] == 0


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run"], ["run", "m.csv"]])
def test_wrong_command_line_exits_2_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage: flux-kontext" in printed.err


def test_key_is_never_printed(sandbox, manifest, output, capsys, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "canary-key")
    assert main(["run", manifest("a lighthouse"), output]) == 2
    printed = capsys.readouterr()
    assert "canary-key" not in printed.out + printed.err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    """No Prefect, server, Pillow, HTTP client, filesystem or progress bar."""
    program = (
        "import sys\n"
        "from prefect_flux_kontext.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'prefect', 'starlette', 'PIL', 'uvicorn', 'httpx', 'fsspec', 's3fs', 'rich'}\n"
        "print('loaded', sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert ran.stderr == "loaded []\n"
    assert ran.stdout


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_progress_without_terminal_is_a_line_every_10_s(capsys):
    """The time left follows from the pace of the rows since the first ones ended."""
    batch = BatchSummary(output="out")
    submitter = SimpleNamespace(accepted=32, outstanding={"a", "b"}, spent=0.96)
    session = SimpleNamespace(progress=batch, submitter=submitter)
    async with show_progress(session, 40):
        await asyncio.sleep(15)
        batch.rows, batch.stored, batch.failed = 28, 25, 3
        await asyncio.sleep(10)
        batch.rows, batch.stored = 32, 29
        await asyncio.sleep(10)
    done = "32 of 40 rows done"
    assert capsys.readouterr().out.splitlines() == [
        "0 of 40 rows done: 32 submitted · 2 running · 0 stored · $0.96",
        "28 of 40 rows done: 32 submitted · 2 running · 25 stored · 3 failed · $0.96",
        f"{done}: 32 submitted · 2 running · 29 stored · 3 failed · $0.96 · about 20 s left",
    ]


def start(arguments, environment=None, **popen):
    return subprocess.Popen(
        [COMMAND, *arguments],
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | (environment or {}),
        **popen,
    )


def read_terminal(master, process):
    """Read everything that a process writes to its terminal."""
    screen = b""
    while True:
        ready, _, _ = select.select([master], [], [], 0.1)
        try:
            piece = os.read(master, 65_536) if ready else b""
        except OSError:  # on Linux: the process has closed the other end
            return screen
        screen += piece
        if not piece and process.poll() is not None:
            return screen


def test_progress_on_a_terminal_is_a_bar(sandbox, manifest, output):
    master, terminal = pty.openpty()
    arguments = ["run", manifest("a lighthouse", "a harbour"), output]
    with start(arguments, {"TERM": "xterm", "COLUMNS": "120"}, stdout=terminal) as process:
        os.close(terminal)
        screen = read_terminal(master, process)
        os.close(master)
        errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert b"2/2" in screen
    assert "2 submitted" in screen.decode()
    assert b"\x1b[" in screen
    assert "2 of 2 rows stored" in re.sub("\x1b\\[[0-9;]*m", "", screen.decode())


def test_ctrl_c_exits_130_without_traceback(sandbox, manifest, output, monkeypatch):
    # No row ends: the first poll is an hour away.
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "3600")
    monkeypatch.setenv("FLUX_KONTEXT_POLL_TIMEOUT", "7200")
    with start(
        ["run", manifest(*(f"number {n}" for n in range(20))), output], stdout=subprocess.PIPE
    ) as process:
        while sandbox.service.bill()["accepted"] < 20:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert err.endswith(b"flux-kontext: interrupted\n")
    assert b"Traceback" not in out + err
