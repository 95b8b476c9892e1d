"""Accounting of a test cluster: its own MariaDB with slurmdbd in front, so that sacct answers."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from tests.slurm.cluster_config import slurmdbd_conf
from tests.slurm.cluster_processes import Processes
from tests.slurm.cluster_settings import ClusterError, Settings


def installed() -> bool:
    """Whether slurmdbd, its MySQL plugin and MariaDB are there."""
    plugins = (
        found for root in ("/usr/lib", "/usr/lib64") for found in Path(root).glob("**/accounting_storage_mysql.so")
    )
    return all(map(shutil.which, ("slurmdbd", "mariadbd", "mariadb-install-db"))) and any(plugins)


def start_database(settings: Settings, processes: Processes) -> None:
    """Make and start a database of this cluster's own, on 127.0.0.1, and write slurmdbd.conf for it."""
    home = settings.directory / "sql"
    temporary = home / "tmp"  # of its own: a MariaDB that starts removes what others have in a shared one
    temporary.mkdir(parents=True, exist_ok=True)
    as_root = ["--user=root"] if os.getuid() == 0 else []
    log = settings.directory / "log" / "mariadb-install.log"
    command = ["mariadb-install-db", "--no-defaults", f"--datadir={home}/data", f"--tmpdir={temporary}", *as_root]
    command += ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
    with log.open("w") as out:
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False).returncode:
            raise ClusterError(f"mariadb-install-db failed, see {log}")
    password = secrets.token_hex(12)
    start = home / "init.sql"
    start.touch(0o600)
    start.write_text(
        "CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
        f"CREATE OR REPLACE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';\n"
    )
    command = ["mariadbd", "--no-defaults", *as_root, f"--datadir={home}/data", f"--tmpdir={temporary}"]
    command += [f"--socket={home}/sql.socket"]
    command += [f"--pid-file={settings.directory}/run/mariadbd.pid", "--bind-address=127.0.0.1", "--skip-name-resolve"]
    command += [f"--port={settings.port('mariadbd')}", f"--init-file={start}", "--performance-schema=OFF"]
    command += ["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"]
    process = processes.start("mariadbd", command)
    processes.await_ready("mariadbd", process, (home / "sql.socket").is_socket)
    conf = settings.directory / "etc" / "slurmdbd.conf"
    conf.touch(0o600)
    conf.write_text(slurmdbd_conf(settings, password))
