"""A temporary PostgreSQL cluster on loopback."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "password-of-the-tests"


def find_programs():
    """Return the folder of PostgreSQL's programs, from Debian's package or the PATH, or None."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    found = [path for path in debian if (path / "initdb").exists()]
    if found:
        return found[-1]
    path = shutil.which("initdb")
    return Path(path).parent if path else None


def find_obstacle():
    """Return why no cluster can run on this machine, or None."""
    if find_programs() is None:
        return "PostgreSQL is not installed (Debian's package postgresql)"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL does not run as root, and there is no user postgres"
    return None


@contextmanager
def running_postgres():
    """Create and run a cluster; yield the URL of its database for Prefect."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        data, secret = Path(folder, "data"), Path(folder, "password")
        secret.write_text(PASSWORD)
        # PostgreSQL refuses to run as root.
        account = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if account:
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")

        def run(program, *arguments):
            subprocess.run(
                [find_programs() / program, "-D", data, *arguments],
                **account,
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        run("initdb", "-U", "prefect", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync")
        port = find_free_port()
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run("pg_ctl", "start", "-w", "-t", "120", "-l", Path(folder, "log"), "-o", options)
        try:
            yield f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")


def find_free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
