"""A terminal in which the commands of a page are typed, and what they print is looked at.

Commands of ours run in this process, servers in the background until the page ends, all others in
a shell. What a page shows below a command has to be what it prints, with `…` for anything.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys

import httpx

from prefect_flux_kontext.cli import main
from tests.docs.blocks import ROOT

_SHELL = re.compile(r"[|<>&;$`]")
_PROGRESS = re.compile(r"^\d+ of \d+ rows done: .*\n", re.MULTILINE)
"""Comes every ten seconds, and so on slow machines alone; a reader sees a bar in its place."""
_SERVERS = {
    # What starts them, what is added so that they are quick and take a free port, and what they
    # print when they are up.
    "flux-kontext sandbox": (["--port=0", "--mean=0.1", "--long-edge=64"], "Stop with Ctrl-C."),
    "flux-kontext receive": (["--port=0"], "Stop with Ctrl-C."),
    "prefect worker start": ([], "started!"),
}
_STOPPED_AT_ONCE = ("prefect worker start",)
"""It would run what the page announces further down, which its own test does."""
_RUN = {
    "flux-kontext": [sys.executable, "-m", "prefect_flux_kontext"],
    "prefect": [sys.executable, "-m", "prefect"],
    "python": [sys.executable],
}
_KEPT = ("FLUX_KONTEXT_", "INCOMING", "RESTYLED")
"""What the variables begin with that pages export."""


class Terminal:
    """Runs commands where the process is, with the process' environment, which they may change.

    Args:
        folder: For what the terminal itself has to keep.
        stand_ins: What is said here in place of what the pages say.
    """

    def __init__(self, folder, stand_ins):
        self._folder = folder
        self._stand_ins = dict(stand_ins)
        self._status = 0
        self._servers = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._servers.close()

    def here(self, text):
        """The text as it is said here."""
        for said, here in self._stand_ins.items():
            text = text.replace(said, here)
        return text

    def follow(self, text):
        """Type the commands of a block, and look at what they print and how they end."""
        told = list(commands_of(text))
        for number, (command, shown) in enumerate(told):
            typed = self.here(command)
            if command == "echo $?":
                printed = str(self._status)
            else:
                self._status, printed = self._ran(typed)
                asked = number + 1 < len(told) and told[number + 1][0] == "echo $?"
                assert asked or self._status == 0, f"$ {typed}\n{self._status}\n{printed}"
            # Only now: a server that was started has its address by now.
            expected = self.here(shown)
            assert not shown or matches(expected, printed), (
                f"$ {typed}\n{printed}\nis not\n{expected}"
            )

    def _ran(self, command):
        for start, (more, up) in _SERVERS.items():
            if command.startswith(start) and "help" not in command:
                with contextlib.ExitStack() as at_once:
                    stopping = at_once if start in _STOPPED_AT_ONCE else self._servers
                    command = [*shlex.split(command, comments=True), *more]
                    return 0, self._serve(command, up, stopping)
        words = [] if _SHELL.search(command) else shlex.split(command, comments=True)
        match words:
            case ["flux-kontext", *arguments]:
                return _main(arguments)
            case ["curl", *arguments]:
                return 0, _curl(arguments)
            case _:
                return self._shell(command)

    def _shell(self, command):
        """Run it in bash, and keep what it exports."""
        ours = "\n".join(f'{name}() {{ {shlex.join(run)} "$@"; }}' for name, run in _RUN.items())
        kept = self._folder / ".environment"
        ran = subprocess.run(
            ["bash", "-c", f"{ours}\n{command}\nstatus=$?\nenv -0 > {kept}\nexit $status"],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        after = dict(line.split("=", 1) for line in kept.read_text().split("\0") if line)
        for name in {*os.environ, *after}:
            if name.startswith(_KEPT):
                os.environ.pop(name, None)
                os.environ.update({name: after[name]} if name in after else {})
        return ran.returncode, ran.stdout

    def _serve(self, command, up, stopping):
        """Start a server, and return what it has said by the time it is up."""
        server = subprocess.Popen(
            [*_RUN[command[0]], *command[1:]],
            env=_environment() | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        stopping.callback(_stop, server)
        printed = ""
        while up not in printed:
            line = server.stdout.readline()
            assert line, f"{shlex.join(command)} ended\n{printed}"
            printed += line
        if command[1] == "sandbox":
            self._stand_ins["http://127.0.0.1:8765"] = re.search(r"http://[\d.:]+", printed)[0]
        return printed


def matches(shown, printed):
    """Whether a command printed what a page shows, where `…` stands for anything."""
    lines = [
        r"(.*\n)*?" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*?") + "\n"
        for line in shown.rstrip().split("\n")
    ]
    told = "".join(f"{line.rstrip()}\n" for line in printed.rstrip().split("\n"))
    return re.fullmatch("".join(lines), told) is not None


def commands_of(text):
    """Each command of a block, and what the block shows below it."""
    lines = text.split("\n")
    while lines:
        line = lines.pop(0)
        if not line:
            continue
        assert line.startswith("$ "), f"{line!r} is below no command"
        command, shown = line.removeprefix("$ ").strip(), []
        while command.endswith("\\"):
            command = command.removesuffix("\\") + lines.pop(0).strip()
        while lines and not lines[0].startswith("$ "):
            shown.append(lines.pop(0))
        yield command, "\n".join(shown).strip("\n")


def _environment():
    # `ls` sorts by the language.
    return os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}


def _main(arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    return status, _PROGRESS.sub("", printed.getvalue())


def _curl(arguments):
    """The few forms of curl that the pages use; not every machine has it."""
    method, body, urls = "GET", None, []
    words = iter(arguments)
    for word in words:
        match word:
            case "-X":
                method = next(words)
            case "-d":
                body = next(words)
            case _:
                urls.append(word)
    (url,) = urls
    reply = httpx.request(method, url, content=body, trust_env=False)
    reply.raise_for_status()
    return reply.text


def _stop(server):
    server.terminate()
    try:
        server.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()
