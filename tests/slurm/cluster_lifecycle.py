"""A test cluster as an object: start it, break it, mend it, throw it away."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slurm import cluster_accounting, cluster_config, cluster_install
from tests.slurm.cluster_nodes import NamespaceNodes, PortNodes, namespaces_possible
from tests.slurm.cluster_processes import Processes, wait_for
from tests.slurm.cluster_settings import ClusterError, Settings, free_slot, hold

# Of a Slurm job that this process may itself be part of.
FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_")


def say(text: str) -> None:
    print(f"cluster: {text}", file=sys.stderr, flush=True)


class Cluster:
    """A running cluster, or one to be started by `up`.

    Attributes:
        settings: as given, with what `up` settled on.
        processes: its daemons.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.processes = Processes(settings.directory, settings.environment)
        self.seconds: dict[str, float] = {}

    @classmethod
    def running(cls, directory: Path) -> Cluster:
        """The cluster of this lab directory.

        Raises:
            ClusterError: none is there.
        """
        settings = Settings.load(directory)
        if settings is None:
            raise ClusterError(f"no cluster in {directory}: start one with `python -m tests.slurm.cluster up`")
        return cls(settings)

    @property
    def machines(self) -> NamespaceNodes | PortNodes:
        kind = NamespaceNodes if self.settings.mode == "netns" else PortNodes
        return kind(self.settings, self.processes)

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with what Slurm's commands need to find the cluster."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return own | self.settings.environment

    def slurm(self, *command: str, seconds: float = 30.0) -> str:
        """Run one of Slurm's commands (or any) against this cluster; gives its standard output.

        Raises:
            ClusterError: exit code not 0, with what it wrote on standard error.
        """
        done = self.attempt(*command, seconds=seconds)
        if done.returncode:
            raise ClusterError(f"{shlex.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        return done.stdout

    def attempt(self, *command: str, seconds: float = 30.0) -> subprocess.CompletedProcess[str]:
        """The same without a complaint; exit code 124 when it took longer than `seconds`."""
        try:
            return subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"no answer within {seconds} s")

    # --- up and down -------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start the cluster and wait until all nodes are idle; a leftover in the lab directory is taken down first.

        Raises:
            ClusterError: something did not start; everything is taken down again, the logs stay.
        """
        cluster_install.require()
        leftover = Settings.load(self.settings.directory)
        if leftover is not None:
            Cluster(leftover).down()
        if self.settings.mode == "auto":
            self.settings.mode = "netns" if namespaces_possible() else "ports"
        if self.settings.accounting == "auto":
            self.settings.accounting = "dbd" if cluster_accounting.installed() else "none"
        try:
            self.start_all()
        except BaseException as error:
            say(f"up failed, taking it down; logs are in {self.processes.log}")
            self.down()
            if isinstance(error, subprocess.SubprocessError | OSError):
                raise ClusterError(f"{error}; logs are in {self.processes.log}") from error
            raise

    def start_all(self) -> None:
        cluster_config.make_directories(self.settings)
        with free_slot(self.settings) as holder:
            self.settings.save()
            self.processes.start("slot", ["sleep", "infinity"], keep_open=(holder.fileno(),))
        cluster_config.write(self.settings)
        with self.timed("network"):
            # before any daemon: where lo is the only interface, Slurm finds no address for any name
            self.machines.prepare()
        with self.timed("munge"):
            self.start_munge()
        if self.settings.accounting == "dbd":
            with self.timed("mariadb"):
                cluster_accounting.start_database(self.settings, self.processes)
            with self.timed("slurmdbd"):
                self.start_accounting()
                self.slurm("sacctmgr", "-i", "add", "cluster", "lab")
        with self.timed("slurmctld"):
            self.start_controller()
        with self.timed("nodes"):
            for node in self.nodes:
                self.machines.boot(node)
            self.wait_idle()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - started

    def start_munge(self) -> None:
        home = self.settings.munge_socket.parent
        (home / "munge.key").touch(0o600)
        (home / "munge.key").write_bytes(os.urandom(128))
        command = ["munged", "--foreground", "--force", f"--socket={self.settings.munge_socket}"]
        command += [f"--key-file={home}/munge.key", f"--seed-file={home}/munge.seed"]
        command += [f"--pid-file={self.processes.run}/munged.pid", f"--log-file={self.processes.log}/munged.log"]
        process = self.processes.start("munged", command)
        self.processes.await_ready("munged", process, self.settings.munge_socket.is_socket)

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers; it goes on from its saved state when it ran before."""
        process = self.processes.start("slurmctld", ["slurmctld", "-D", "-f", str(self.settings.conf)])
        self.processes.await_ready("slurmctld", process, lambda: self.answers("scontrol", "ping"))

    def start_accounting(self) -> None:
        """Start slurmdbd and wait until it answers."""
        process = self.processes.start("slurmdbd", ["slurmdbd", "-D"])
        self.processes.await_ready("slurmdbd", process, lambda: self.answers("sacctmgr", "show", "cluster"))

    def stop_accounting(self) -> None:
        """Stop slurmdbd; sacct then fails, slurmctld keeps what it has to tell."""
        self.processes.stop("slurmdbd", signal.SIGTERM)

    def answers(self, *command: str) -> bool:
        return self.attempt(*command, seconds=5).returncode == 0

    def stop_controller(self, kill: bool = False) -> None:
        """Stop slurmctld; `kill`: without a chance to save its state."""
        self.processes.stop("slurmctld", signal.SIGKILL if kill else signal.SIGTERM)

    def restart_controller(self, kill: bool = False) -> None:
        self.stop_controller(kill)
        self.start_controller()

    def down(self) -> None:
        """Kill everything, as nothing is to be kept, and remove all below the lab directory but the logs."""
        if self.processes.pid("slurmctld"):
            # so that an srun or salloc that waits on this machine ends
            self.attempt("scancel", "-f", "--full", f"--user={cluster_config.user()}", seconds=5)
            wait_for(lambda: not self.jobs(), 1)
        if self.settings.slot >= 0:
            for node in self.nodes:
                self.machines.kill(node)
            for daemon in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
                self.processes.stop(daemon)
            # not where a cluster ended by itself and another one got its names since
            keeper = None if self.processes.pid("slot") else hold(self.settings.slot)
            if self.processes.pid("slot") or keeper:
                self.machines.remove()
            if keeper:
                keeper.close()
            self.processes.stop("slot")
        for entry in self.settings.directory.glob("*"):
            if entry.is_dir() and entry.name != "log":
                shutil.rmtree(entry)
        (self.settings.directory / "settings.json").unlink(missing_ok=True)

    # --- nodes -------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        return self.settings.node_names

    @property
    def mode(self) -> str:
        return self.settings.mode

    def states(self) -> dict[str, str]:
        """State of each node as sinfo writes it short: idle, mix, alloc, down, drain, ...; "*" after it: no answer."""
        shown = self.attempt("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", seconds=10).stdout
        return dict(line.split() for line in shown.splitlines() if len(line.split()) == 2)

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Wait until no job is left and every node is idle.

        Raises:
            ClusterError: not within `seconds`.
        """

        def idle() -> bool:
            return self.states() == dict.fromkeys(self.nodes, "idle") and not self.jobs()

        if not wait_for(idle, seconds):
            raise ClusterError(
                f"not idle after {seconds:.0f} s: nodes {self.states()}, jobs {self.jobs()}\n"
                + "\n".join(map(self.processes.tail, self.nodes))
            )

    def jobs(self) -> list[str]:
        """Jobs not ended: id, state and reason."""
        return self.attempt("squeue", "-h", "-a", "-o", "%A %T %r", seconds=10).stdout.splitlines()

    def crash(self, node: str) -> None:
        """Power cut: everything that runs on the node is gone at once and without a word. Slurm sees it in 15-35 s."""
        self.settings.index(node)
        self.machines.kill(node)

    def revive(self, node: str) -> None:
        """Boot a crashed node again and wait until its slurmd listens; Slurm takes it back when it registers."""
        self.settings.index(node)
        if self.processes.pid(node) is None:
            self.machines.boot(node)
            if not wait_for(lambda: self.listens(node), 30):
                raise ClusterError(f"{node} did not boot\n{self.processes.tail(node)}")

    def listens(self, node: str) -> bool:
        try:
            with socket.create_connection((self.settings.address(node), self.settings.port(node)), 1):
                return True
        except OSError:
            return False

    def cut(self, node: str) -> None:
        """Pull the node's network cable; what runs there runs on.

        Raises:
            NotInThisMode: a cluster on ports has no cables.
        """
        self.machines.cut(node)

    def heal(self, node: str) -> None:
        """Plug the cable in again."""
        self.settings.index(node)
        self.machines.heal(node)

    def exec(self, node: str, *command: str, seconds: float = 30.0) -> str:
        """Run a command on the node, past Slurm; gives its standard output. On ports it runs on this machine."""
        return self.slurm(*self.machines.command(node, list(command)), seconds=seconds)

    def drain(self, node: str) -> None:
        """Take a node out of service until `clean` or `scontrol ... state=resume`. What `state=down` does is undone
        within a second or so, as the node is alive and ReturnToService is 2."""
        self.slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=drained by a test")

    # --- settings ----------------------------------------------------------------------------------------------------

    def configure(self, **parameters: object) -> None:
        """Change parameters of slurm.conf (EnforcePartLimits="ALL", JobRequeue=0, ...) while it runs, until `clean`."""
        cluster_config.change(self.settings, parameters)
        self.slurm("scontrol", "reconfigure")

    def clean(self) -> None:
        """Undo what a test left: settings and partitions are as at first, daemons and nodes run, no job is left.

        Raises:
            ClusterError: the nodes are not idle within a minute.
        """
        cluster_config.change(self.settings, {})
        if self.settings.accounting == "dbd" and self.processes.pid("slurmdbd") is None:
            self.start_accounting()
        if self.processes.pid("slurmctld") is None:
            self.start_controller()
        for node in self.nodes:
            self.heal(node)
            self.revive(node)
        self.cancel_jobs()
        # partitions, too, are again as slurm.conf says. Not before the jobs are gone: one that is being cancelled while
        # slurmd reads its configuration can hang as COMPLETING for half a minute and longer
        self.slurm("scontrol", "reconfigure")
        for node, state in self.states().items():
            if state.startswith(("down", "drain", "drng")):
                self.attempt("scontrol", "update", f"nodename={node}", "state=resume")
        self.wait_idle()

    def cancel_jobs(self, seconds: float = 60.0) -> None:
        """Cancel all jobs and wait for their end; again every few seconds, as a test's process may still be submitting.

        Raises:
            ClusterError: some are left after `seconds`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.attempt("scancel", "-f", "--full", f"--user={cluster_config.user()}")
            if wait_for(lambda: not self.jobs(), 5):
                return
        raise ClusterError(f"jobs not ended after {seconds:.0f} s: {self.jobs()}, nodes {self.states()}")
