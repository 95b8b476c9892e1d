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
from dataclasses import asdict
from pathlib import Path

from tests.slurm import cluster_install
from tests.slurm.cluster_lifecycle import Cluster, say
from tests.slurm.cluster_settings import CHECKOUT, VARIABLE, ClusterError, Settings, default_directory


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
    if not command or shutil.which(command[0]) is None:
        raise ClusterError(f"no such command: {shlex.join(command) or 'none was given'}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cluster = bring_up(settings)
    try:
        return subprocess.run(command, env=cluster.environment, check=False).returncode
    finally:
        cluster.down()


def rootless(settings: Settings, command: list[str]) -> int:
    """`run` within one user namespace, where an ordinary user counts as root and may make the nodes' namespaces."""
    if os.getuid() and shutil.which("newuidmap") is None:
        raise ClusterError("rootless needs newuidmap: have the package uidmap installed, and a line in /etc/subuid")
    if settings.directory == default_directory():  # the processes of a cluster there would not be seen from inside
        settings.directory = settings.directory.with_name(f"{settings.directory.name}-rootless")
    environment = {VARIABLE + name.upper(): str(value) for name, value in asdict(settings).items()}
    environment |= {VARIABLE + "MODE": "netns"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    unshare = ["unshare", "--user", "--map-root-user", "--map-auto", "--net", "--mount", "--pid", "--fork"]
    unshare += ["--mount-proc", "--kill-child=KILL"]
    inside = 'mount -t tmpfs tmpfs /run && mkdir /run/netns && ip link set lo up && exec "$@"'
    again = [sys.executable, "-m", "tests.slurm.cluster", "run", *command]
    return subprocess.run(
        [*unshare, "bash", "-c", inside, "rootless", *again], env=os.environ | environment, check=False
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
    action("rootless", "`run` with namespaces as an ordinary user", options, words="CMD")
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
            started = time.monotonic()
            cluster_install.install(accounting=settings.accounting != "none")
            say(f"installed in {time.monotonic() - started:.0f} s")
        case "up":
            bring_up(settings)
        case "run":
            return run(settings, given.command)
        case "rootless":
            return rootless(settings, given.command)
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
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
