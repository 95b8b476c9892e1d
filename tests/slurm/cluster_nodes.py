"""The compute nodes of a test cluster, in either form: sets of namespaces, or slurmd processes on ports of one host."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.slurm.cluster_processes import Processes, children, descendants, running, wait_for
from tests.slurm.cluster_settings import ClusterError, NotInThisMode, Settings

# Process 1 of a node. It stays a shell, which waits for orphans; when slurmd ends, the node ends.
INIT = """\
hostname "$1"
mount --bind "$2/etc/hosts" /etc/hosts
mount --bind "$2/etc/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o size=1g tmpfs /dev/shm
slurmd -D -f "$2/etc/slurm.conf" -N "$1" &
wait $!
"""
UNSHARE = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def attempt(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def namespaces_possible() -> bool:
    """Whether this user may make network namespaces, bridges and links, and mount in a namespace. Leaves nothing."""
    if os.getuid() != 0:
        return False
    trial = "ip link add t0 type bridge && ip link add t1 type veth peer name t2 && mount -t tmpfs tmpfs /dev/shm"
    name = f"dts-probe-{os.getpid()}"
    with suppress(FileNotFoundError):
        if attempt(*UNSHARE, "--net", "bash", "-c", trial) and attempt("ip", "netns", "add", name):
            return attempt("ip", "netns", "delete", name)
    return False


class NamespaceNodes:
    """A node = its own network (a link to a bridge that is the login node), hostname, processes, mounts, /dev/shm."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings = settings
        self.processes = processes
        self.bridge = settings.prefix

    def namespace(self, node: str) -> str:
        return f"{self.settings.prefix}-{node}"

    def link(self, node: str) -> str:
        """The login node's end of the node's cable."""
        return f"{self.settings.prefix}v{self.settings.index(node)}"

    def prepare(self) -> None:
        login = f"{self.settings.network}.1"
        call("ip", "link", "add", self.bridge, "type", "bridge")
        call("ip", "address", "add", f"{login}/24", "dev", self.bridge)
        call("ip", "link", "set", self.bridge, "up")
        for node in self.settings.node_names:
            inside = ("ip", "-n", self.namespace(node))
            call("ip", "netns", "add", self.namespace(node))
            call("ip", "link", "add", self.link(node), "type", "veth", "peer", "eth0", "netns", self.namespace(node))
            call("ip", "link", "set", self.link(node), "master", self.bridge, "up")
            call(*inside, "address", "add", f"{self.settings.address(node)}/24", "dev", "eth0")
            call(*inside, "link", "set", "eth0", "up")
            call(*inside, "link", "set", "lo", "up")
            call(*inside, "route", "add", "default", "via", login)

    def remove(self) -> None:
        for node in self.settings.node_names:
            attempt("ip", "link", "delete", self.link(node))
            attempt("ip", "netns", "delete", self.namespace(node))
        attempt("ip", "link", "delete", self.bridge)

    def boot(self, node: str) -> None:
        self.heal(node)
        init = ["bash", "-c", INIT, "node-init", node, str(self.settings.directory)]
        self.processes.start(node, ["ip", "netns", "exec", self.namespace(node), *UNSHARE, *init])

    def kill(self, node: str) -> None:
        pid = self.processes.pid(node)
        if pid is None:
            return
        # silence first, as in a power cut: the peers' connections get no reset
        attempt("ip", "link", "set", self.link(node), "down")
        for init in children(pid):
            with suppress(ProcessLookupError):
                os.kill(init, signal.SIGKILL)  # and with its process 1 everything on the node
        wait_for(lambda: not running(pid), 5)
        self.processes.stop(node)

    def cut(self, node: str) -> None:
        call("ip", "link", "set", self.link(node), "down")

    def heal(self, node: str) -> None:
        call("ip", "link", "set", self.link(node), "up")

    def command(self, node: str, command: list[str]) -> list[str]:
        pid = self.processes.pid(node)
        init = children(pid) if pid else []
        if not init:
            raise ClusterError(f"{node} does not run: revive it first")
        return ["nsenter", "-t", str(init[0]), "-n", "-u", "-i", "-m", "-p", "--", *command]


class PortNodes:
    """A node = a slurmd on its own port of this host. Hostname, addresses and processes are the host's."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings = settings
        self.processes = processes
        self.mark = f"# test cluster {settings.directory}"

    def prepare(self) -> None:
        """Let the nodes' names resolve, where this user may say so."""
        if os.access("/etc/hosts", os.W_OK):
            self.edit_hosts([f"127.0.0.1 {node} {self.mark}" for node in self.settings.node_names])
        else:
            print("cluster: /etc/hosts is not ours to write: node1, ... do not resolve here", file=sys.stderr)

    def remove(self) -> None:
        if os.access("/etc/hosts", os.W_OK):
            self.edit_hosts([])

    def edit_hosts(self, lines: list[str]) -> None:
        """Put this cluster's lines in, or take them out. In place: in a container the file is a mount of its own."""
        with Path("/etc/hosts").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            kept = [line for line in before.splitlines() if not line.endswith(self.mark)]
            after = "\n".join([*kept, *lines, ""])
            if after != before:
                file.seek(0)
                file.write(after)
                file.truncate()

    def boot(self, node: str) -> None:
        reaper = str(Path(__file__).with_name("cluster_reaper.py"))
        slurmd = ["slurmd", "-D", "-f", str(self.settings.conf), "-N", node]
        self.processes.start(node, [sys.executable, reaper, *slurmd])

    def kill(self, node: str) -> None:
        pid = self.processes.pid(node)

        def killed() -> bool:
            # again until none is left: they may be forking
            below = descendants(pid) if pid else []
            for found in below:
                with suppress(ProcessLookupError):
                    os.kill(found, signal.SIGKILL)
            return not below

        wait_for(killed, 10)
        self.processes.stop(node)

    def cut(self, node: str) -> None:
        raise NotInThisMode(
            "a network cut needs nodes with a network of their own (mode netns); this cluster is on ports"
        )

    def heal(self, node: str) -> None:
        """Nothing can have been cut."""

    def command(self, node: str, command: list[str]) -> list[str]:
        self.settings.index(node)
        return ["env", f"SLURMD_NODENAME={node}", *command]
