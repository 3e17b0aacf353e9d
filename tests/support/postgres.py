"""A PostgreSQL cluster of our own on loopback, for as long as a block runs."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "password-of-the-tests"


def programs():
    """The folder of PostgreSQL's programs, as Debian or a PATH has them, or None."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    found = [path for path in debian if (path / "initdb").exists()]
    if found:
        return found[-1]
    where = shutil.which("initdb")
    return Path(where).parent if where else None


def why_not():
    """Why no cluster can be run here, or None."""
    if programs() is None:
        return "PostgreSQL is not installed (Debian's package postgresql)"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL does not run as root, and there is no user postgres"
    return None


@contextmanager
def running_postgres():
    """Make a cluster and run it; yields the URL of its database for Prefect."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        data, secret = Path(folder, "data"), Path(folder, "password")
        secret.write_text(PASSWORD)
        # It refuses to run as root.
        who = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if who:
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")

        def run(program, *arguments):
            subprocess.run(
                [programs() / program, "-D", data, *arguments],
                **who,
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        run("initdb", "-U", "prefect", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync")
        port = _free_port()
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run("pg_ctl", "start", "-w", "-t", "120", "-l", Path(folder, "log"), "-o", options)
        try:
            yield f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
