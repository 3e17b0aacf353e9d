import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from prefect_flux_kontext.cli.commands import create_parser
from prefect_flux_kontext.cli.sandbox import serve_sandbox
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.sandbox.helpers import KEY, STATUS, SUBMIT

RUN = "import sys; from prefect_flux_kontext.cli import main; sys.exit(main())"


def parsed(*words):
    return create_parser().parse_args(["sandbox", *words])


def test_a_running_sandbox_serves_the_whole_way_over_http():
    settings = SandboxSettings(mean=0, long_edge=64)
    with running_sandbox(settings) as sandbox:
        with httpx.Client(base_url=sandbox.url, headers=KEY) as client:
            reference = client.get("/references").json()[0]["url"]
            body = {"input": {"mode": "pro", "prompt": "oil", "image_urls": [reference]}}
            task = client.post(SUBMIT, json=body).json()["data"]
            data = client.get(STATUS, params=task).json()["data"]
            while data["state"] == "processing":
                data = client.get(STATUS, params=task).json()["data"]
            url = f"{sandbox.url}/results/{task['taskId']}/1.jpg"
            assert url in data["resultJson"]
            assert client.get(url).headers["content-type"] == "image/jpeg"
        assert sandbox.service.bill()["accepted"] == 1
        assert [record["state"] for record in sandbox.service.records()] == ["success"]
        assert sandbox.settings is settings
    with pytest.raises(httpx.ConnectError):
        httpx.get(sandbox.url)


@pytest.mark.parametrize("faults", [[], ["submit:no-task-id"], ["submit:reset"]])
def test_client_disconnect_is_not_logged(faults, caplog):
    with running_sandbox(plan=FaultPlan(faults=faults)) as sandbox:
        port = int(sandbox.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"POST {SUBMIT} HTTP/1.1\r\nHost: x\r\n".encode())
            client.sendall(b"Authorization: Bearer k\r\nContent-Length: 99\r\n\r\n{")
        reply = httpx.get(f"{sandbox.url}/sandbox/bill", trust_env=False)
        assert reply.json()["accepted"] == 0
    assert caplog.text == ""


def test_two_sandboxes_run_side_by_side_and_share_nothing():
    with running_sandbox() as one, running_sandbox() as two:
        httpx.post(one.url + SUBMIT, json={"input": {"mode": "pro", "prompt": "a"}}, headers=KEY)
        assert one.service.bill()["accepted"] == 1
        assert two.service.bill()["accepted"] == 0


def test_a_running_sandbox_cannot_take_a_port_that_is_taken():
    with running_sandbox() as sandbox:
        second = running_sandbox(port=int(sandbox.url.rsplit(":", 1)[1]))
        with pytest.raises(OSError, match="in use"):
            second.__enter__()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_prints_exports_and_stops_cleanly(number):
    arguments = [sys.executable, "-c", RUN, "sandbox", "--port", "0", "--mean", "0.5"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        url = process.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/sandbox/bill").json()["accepted"] == 0
        process.send_signal(number)
        process.wait(timeout=20)
        out, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0
    assert err == ""
    assert f"export FLUX_KONTEXT_BASE_URL={url}\n" in out
    assert "export FLUX_KONTEXT_API_KEY=sandbox\n" in out
    assert f"{url}/sandbox/bill" in out


def test_the_command_says_in_one_line_that_the_port_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        args = parsed("--port", str(taken.getsockname()[1]))
        assert serve_sandbox(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "cannot listen" in captured.err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--mean", "soon"], "--mean"),
        (["--slots", "0"], "--slots"),
        (["--references", "/no/such/folder"], "--references"),
        (["--price-pro", "-1"], "--price-pro"),
    ],
)
def test_the_command_names_an_option_it_cannot_use(words, option, capsys):
    args = parsed(*words)
    assert serve_sandbox(args) == 2
    assert option in capsys.readouterr().err


def test_every_setting_is_an_option_with_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in SandboxSettings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert field.description in shown


def test_the_command_lists_the_faults_and_starts_nothing(capsys):
    args = parsed("--fault", "help")
    assert serve_sandbox(args) == 0
    out = capsys.readouterr().out
    assert "\nsubmit: " in f"\n{out}"
    assert "lost-reply " in out
    assert "callback: " in out


@pytest.mark.parametrize("words", [["--fault", "submit:rain"], ["--faults", "/no/such/plan"]])
def test_the_command_refuses_a_plan_of_faults_it_cannot_use(words, capsys):
    args = parsed(*words)
    assert serve_sandbox(args) == 2
    assert words[1] in capsys.readouterr().err


def test_command_starts_with_a_plan_of_faults(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("slow: 1\nfaults: ['status:html=0.1']\n")
    faults = ["--fault", "submit:limited@2", "--faults", str(file), "--seed", "4"]
    arguments = [sys.executable, "-c", RUN, "sandbox", "--port", "0", *faults]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        url = process.stdout.readline().split()[-1]
        plan = httpx.get(f"{url}/sandbox/faults").json()["plan"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert (plan["seed"], plan["slow"]) == (4, 1)
    assert plan["faults"] == ["submit:limited@2", "status:html=0.1"]


def test_the_sandbox_shares_no_code_with_the_client_side():
    script = (
        "import sys, prefect_flux_kontext.sandbox.server as _\n"
        "print(*(name for name in sys.modules if name.split('.')[0] in"
        " {'prefect', 'prefect_flux_kontext'}))"
    )
    names = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name for name in names if not name.startswith("prefect_flux_kontext.sandbox")}
    assert ours == {"prefect_flux_kontext"}


def test_the_help_of_the_command_imports_nothing_heavy():
    script = (
        "import sys, prefect_flux_kontext.cli.commands as _\n"
        "print({'starlette', 'uvicorn', 'PIL', 'httpx'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "sandbox:8765"}, 200),
        ({"Host": "[::1]:8765"}, 200),
        ({"Host": "192.168.1.5"}, 200),
        ({"Host": "rebound.example.com"}, 403),
        ({"Host": "127.0.0.1.nip.io"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Origin": "https://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
    ],
)
def test_foreign_pages_are_refused(headers, status):
    with running_sandbox() as sandbox:
        assert httpx.get(f"{sandbox.url}/sandbox/bill", headers=headers).status_code == status
        reset = httpx.post(f"{sandbox.url}/sandbox/reset", headers=headers)
        assert reset.status_code == status
