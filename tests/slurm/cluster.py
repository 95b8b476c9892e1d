"""A real Slurm of several nodes on this one machine, for the tests: up in seconds, thrown away afterwards.

No systemd, no containers, nothing in /etc but (mode ports, as root) marked lines of /etc/hosts; see
docs/slurm_cluster.md. Only the standard library is imported, so that it runs before anything is installed:

    python -m tests.slurm.cluster --help
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slurm import cluster_accounting, cluster_config, cluster_install
from tests.slurm.cluster_nodes import NamespaceNodes, PortNodes, namespaces_possible
from tests.slurm.cluster_processes import Processes, wait_for
from tests.slurm.cluster_settings import CHECKOUT, VARIABLE, ClusterError, Settings, slot


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
        return {**os.environ, **self.settings.environment}

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
        with slot(self.settings) as holder:
            self.settings.save()
            cluster_config.write(self.settings)
            self.processes.start("slot", ["sleep", "infinity"], keep_open=(holder.fileno(),))
        with self.timed("network"):
            # before any daemon: where lo is the only interface, Slurm finds no address for any name
            self.machines.prepare()
        with self.timed("munge"):
            self.start_munge()
        if self.settings.accounting == "dbd":
            with self.timed("mariadb"):
                password = cluster_accounting.start_database(self.settings, self.processes)
            with self.timed("slurmdbd"):
                cluster_accounting.start_slurmdbd(self.settings, self.processes, password)
        with self.timed("slurmctld"):
            self.start_controller()
        with self.timed("nodes"):
            for node in self.nodes:
                self.machines.boot(node)
            self.wait_idle(30)

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
        self.processes.await_ready("munged", process, self.settings.munge_socket.is_socket, 10)

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers; it goes on from its saved state when it ran before."""
        process = self.processes.start("slurmctld", ["slurmctld", "-D", "-f", str(self.settings.conf)])
        answers = lambda: self.attempt("scontrol", "ping", seconds=5).returncode == 0  # noqa: E731
        self.processes.await_ready("slurmctld", process, answers, 20)

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
        if self.settings.slot >= 0:
            for node in self.nodes:
                self.machines.kill(node)
            for daemon in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
                self.processes.stop(daemon)
            self.machines.remove()
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
        """Power cut: everything that runs on the node is gone at once and without a word. Slurm sees it in 26-33 s."""
        self.settings.index(node)
        self.machines.kill(node)

    def revive(self, node: str) -> None:
        """Boot a crashed node again."""
        self.settings.index(node)
        if self.processes.pid(node) is None:
            self.machines.boot(node)

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

    def clean(self) -> None:
        """Undo what a test left: the controller runs, cables are in, nodes run and are in service, no job is left."""
        if self.processes.pid("slurmctld") is None:
            self.start_controller()
        for node in self.nodes:
            self.heal(node)
            self.revive(node)
        self.attempt("scancel", "-f", "--full", f"--user={cluster_config.user()}")
        out_of_service = [node for node, state in self.states().items() if state.startswith(("down", "drain", "drng"))]
        for node in out_of_service:
            self.attempt("scontrol", "update", f"nodename={node}", "state=resume")
        self.wait_idle()


# --- command line ----------------------------------------------------------------------------------------------------


def bring_up(settings: Settings) -> Cluster:
    cluster = Cluster(settings)
    started = time.monotonic()
    cluster.up()
    parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in cluster.seconds.items())
    say(f"ready in {time.monotonic() - started:.1f} s ({parts})")
    say(f"{settings.nodes} nodes, mode {settings.mode}, accounting {settings.accounting}, in {settings.directory}")
    return cluster


def run(settings: Settings, command: list[str]) -> int:
    """Up, the command with SLURM_CONF set, down; gives the command's exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cluster = bring_up(settings)
    try:
        return subprocess.run(command, env=cluster.environment, check=False).returncode
    finally:
        cluster.down()


def rootless(command: list[str]) -> int:
    """The command and a cluster of namespaces within one user namespace, where an ordinary user counts as root."""
    if os.getuid() and shutil.which("newuidmap") is None:
        raise ClusterError("rootless needs newuidmap: have the package uidmap installed, and a line in /etc/subuid")
    inside = 'mount -t tmpfs tmpfs /run && mkdir /run/netns && ip link set lo up && exec "$@"'
    again = [sys.executable, "-m", "tests.slurm.cluster", "run", "--mode", "netns", *command]
    unshare = ["unshare", "--user", "--map-root-user", "--map-auto", "--net", "--mount", "--pid", "--fork"]
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [*unshare, "--mount-proc", "--kill-child=KILL", "bash", "-c", inside, "rootless", *again],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    ).returncode


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__.splitlines()[0])
    actions = main_parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--nodes", type=int, help="compute nodes (2)")
    options.add_argument("--cpus", type=int, help="pretended CPUs per node (8)")
    options.add_argument("--memory", type=int, help="pretended MB per node (8000)")
    options.add_argument("--gpus", type=int, help="pretended GPUs per node (2)")
    options.add_argument("--mode", choices=["auto", "netns", "ports"], help="what a node is made of (auto)")
    options.add_argument("--accounting", choices=["auto", "dbd", "none"], help="whether sacct answers (auto)")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--directory", type=Path, help=f"the lab directory ({VARIABLE}DIRECTORY, or one per checkout)")

    def action(name: str, text: str, *parents: argparse.ArgumentParser, words: str = "") -> None:
        added = actions.add_parser(name, help=text, parents=[place, *parents])
        if "NODE" in words:
            added.add_argument("node", metavar="NODE")
        if "CMD" in words:
            added.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD ...")

    action("install", "install the packages by apt-get, as root", options)
    action("up", "start a cluster", options)
    action("down", "stop it and remove everything but its logs")
    action("status", "nodes and jobs")
    action("run", "up, CMD with SLURM_CONF set, down", options, words="CMD")
    action("rootless", "`run` with namespaces as an ordinary user", words="CMD")
    action("env", 'what a shell must export: eval "$(... env)"')
    action("crash", "power cut of a node", words="NODE")
    action("revive", "boot a crashed node", words="NODE")
    action("cut", "pull a node's network cable (netns)", words="NODE")
    action("heal", "plug it in again", words="NODE")
    action("exec", "run CMD on a node, past Slurm", words="NODE CMD")
    action("restart-controller", "stop and start slurmctld while jobs run")
    return main_parser


def act(given: argparse.Namespace) -> int:
    names = ("directory", "nodes", "cpus", "memory", "gpus", "mode", "accounting")
    settings = Settings.from_environment(**{name: getattr(given, name, None) for name in names})
    match given.action:
        case "install":
            cluster_install.install(accounting=settings.accounting != "none")
        case "up":
            bring_up(settings)
        case "run":
            return run(settings, given.command)
        case "rootless":
            return rootless(given.command)
        case "down":
            found = Settings.load(settings.directory)
            if found is None:
                say(f"no cluster in {settings.directory}")
            else:
                Cluster(found).down()
        case other:
            return on_running(Cluster.running(settings.directory), other, given)
    return 0


def on_running(cluster: Cluster, action: str, given: argparse.Namespace) -> int:
    if action == "env":
        print(
            "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in cluster.settings.environment.items())
        )
    elif action == "status":
        print(cluster.slurm("sinfo", "-N", "-l"), cluster.slurm("squeue", "-a"), sep="\n", end="")
    elif action == "exec":
        command = cluster.machines.command(given.node, given.command)
        return subprocess.run(command, env=cluster.environment, check=False).returncode
    elif action == "restart-controller":
        cluster.restart_controller()
    else:
        getattr(cluster, action)(given.node)
    return 0


def main() -> None:
    # Debian keeps the daemons where ordinary users do not look
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    try:
        sys.exit(act(parser().parse_args()))
    except ClusterError as error:
        say(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
