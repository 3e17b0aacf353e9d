"""Run the commands of a page and compare what they print with what the page shows.

`flux-kontext` runs in this process, servers in the background until the page ends, everything else
in a shell. `…` on the page matches anything.
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
"""Printed every ten seconds, so only on slow machines; a terminal shows a bar instead."""
_SERVERS = {
    # Command, arguments that make it quick and choose a free port, and what it prints when up.
    "flux-kontext sandbox": (["--port=0", "--mean=0.1", "--long-edge=64"], "Stop with Ctrl-C."),
    "flux-kontext receive": (["--port=0"], "Stop with Ctrl-C."),
    "prefect worker start": ([], "started!"),
}
_STOPPED_IMMEDIATELY = ("prefect worker start",)
"""A running worker would start what the page announces later; another test does that."""
_RUN = {
    "flux-kontext": [sys.executable, "-m", "prefect_flux_kontext"],
    "prefect": [sys.executable, "-m", "prefect"],
    "python": [sys.executable],
}
_EXPORTED_PREFIXES = ("FLUX_KONTEXT_", "INCOMING", "RESTYLED")
"""Prefixes of the variables that pages export."""


class Terminal:
    """Runs commands in the working directory, with an environment that they may change.

    Args:
        folder: Where the terminal keeps its own files.
        replacements: Texts of the pages and what replaces them here, such as addresses.
    """

    def __init__(self, folder, replacements):
        self._folder = folder
        self._replacements = dict(replacements)
        self._status = 0
        self._servers = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._servers.close()

    def localize(self, text):
        """Return the text with the addresses and keys of this test."""
        for original, replacement in self._replacements.items():
            text = text.replace(original, replacement)
        return text

    def follow(self, text):
        """Run the commands of a block, and check their output and exit status."""
        commands = list(commands_of(text))
        for number, (command, shown) in enumerate(commands):
            typed = self.localize(command)
            if command == "echo $?":
                printed = str(self._status)
            else:
                self._status, printed = self._run(typed)
                shows_status = number + 1 < len(commands) and commands[number + 1][0] == "echo $?"
                assert shows_status or self._status == 0, f"$ {typed}\n{self._status}\n{printed}"
            # Only now: a server that was just started has its address.
            expected = self.localize(shown)
            assert not shown or matches(expected, printed), (
                f"$ {typed}\n{printed}\nis not\n{expected}"
            )

    def _run(self, command):
        for start, (arguments, up) in _SERVERS.items():
            if command.startswith(start) and "help" not in command:
                with contextlib.ExitStack() as immediately:
                    stopping = immediately if start in _STOPPED_IMMEDIATELY else self._servers
                    command = _override(shlex.split(command, comments=True), arguments)
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
        """Run a command in bash, and keep what it exports."""
        functions = "\n".join(
            f'{name}() {{ {shlex.join(run)} "$@"; }}' for name, run in _RUN.items()
        )
        environment = self._folder / ".environment"
        completed = subprocess.run(
            [
                "bash",
                "-c",
                f"{functions}\n{command}\nstatus=$?\nenv -0 > {environment}\nexit $status",
            ],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        after = dict(line.split("=", 1) for line in environment.read_text().split("\0") if line)
        for name in {*os.environ, *after}:
            if name.startswith(_EXPORTED_PREFIXES):
                os.environ.pop(name, None)
                os.environ.update({name: after[name]} if name in after else {})
        return completed.returncode, completed.stdout

    def _serve(self, command, up, stopping):
        """Start a server, and return what it printed until it was up."""
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
            self._replacements["http://127.0.0.1:8765"] = re.search(r"http://[\d.:]+", printed)[0]
        return printed


def matches(shown, printed):
    """Return whether a command printed what a page shows, where `…` matches anything."""
    lines = [
        r"(.*\n)*?" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*?") + "\n"
        for line in shown.rstrip().split("\n")
    ]
    output = "".join(f"{line.rstrip()}\n" for line in printed.rstrip().split("\n"))
    return re.fullmatch("".join(lines), output) is not None


def commands_of(text):
    """Yield each command of a block with the output that the block shows below it."""
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
    # `ls` sorts by locale.
    return os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}


def _override(command, options):
    """Return the command with these `--name=value` options instead of its own values for them."""
    names = {option.partition("=")[0] for option in options}
    kept, words = [], iter(command)
    for word in words:
        name, has_value, _ = word.partition("=")
        if name not in names:
            kept.append(word)
        elif not has_value:
            next(words)
    return [*kept, *options]


def _main(arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code
    return status, _PROGRESS.sub("", printed.getvalue())


def _curl(arguments):
    """Do what the pages use curl for; not every machine has curl."""
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
