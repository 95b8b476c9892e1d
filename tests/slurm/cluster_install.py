"""The packages a test cluster needs, on Debian and Ubuntu."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slurm.cluster_settings import ClusterError

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "procps", "util-linux")
ACCOUNTING = ("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server")
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "sinfo", "squeue", "scontrol")
POLICY = Path("/usr/sbin/policy-rc.d")


def missing() -> list[str]:
    """Commands that are not there and without which no cluster can be."""
    return [command for command in COMMANDS if shutil.which(command) is None]


def require() -> None:
    if missing():
        raise ClusterError(f"{', '.join(missing())} not found: run `python -m tests.slurm.cluster install` as root")


@contextmanager
def no_daemon_starts() -> Iterator[None]:
    """Debian asks this script before a package starts its system daemon; 101 forbids it."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def install(accounting: bool) -> None:
    """Install by apt-get, as root, without starting any system daemon.

    Raises:
        ClusterError: not root, no apt-get, or it failed.
    """
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        wanted = " ".join((*PACKAGES, *ACCOUNTING))
        raise ClusterError(f"installing needs root and apt-get; the packages are: {wanted}")
    packages = (*PACKAGES, *(ACCOUNTING if accounting else ()))
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with no_daemon_starts():
        for command in (["update", "-q"], ["install", "-yq", "--no-install-recommends", *packages]):
            if subprocess.run(["apt-get", *command], env=environment, check=False).returncode:
                raise ClusterError(f"apt-get {' '.join(command)} failed")
