"""What a test cluster is to be, where it lives, and which names, addresses and ports of the machine it may use."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
VARIABLE = "TEST_CLUSTER_"  # + the setting's name in capitals: how the environment gives a default
SLOTS = 240  # a slot is a /24 network, 64 ports and the names dts<slot>*
FIRST_PORT = 17000  # below the ports that Linux gives to outgoing connections (32768 on)
MOST_NODES = 40
LONGEST_SOCKET_PATH = 107


class ClusterError(RuntimeError):
    """What went wrong and where to look, in one message."""


class NotInThisMode(ClusterError):
    """A fault that needs network namespaces was asked of a cluster on ports."""


def default_directory() -> Path:
    """One lab directory for each user and checkout, so that two checkouts never take each other's cluster down.

    Short, as the paths of sockets are below it.
    """
    name = hashlib.sha256(str(CHECKOUT).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"dist-train-slurm-{os.getuid()}-{name}"


@dataclass
class Settings:
    """Settings of one cluster; those with "auto" and the slot are settled by `up`.

    Attributes:
        directory: the lab directory; everything of the cluster is below it.
        nodes: number of compute nodes, named node1, node2, ...
        cpus: pretended CPUs per node.
        memory: pretended memory per node, in MB.
        gpus: pretended GPUs per node.
        mode: "netns" (a node is a set of namespaces with its own address), "ports" (a node is a slurmd on its own
            port), or "auto".
        accounting: "dbd" (slurmdbd over MariaDB: sacct answers), "none", or "auto".
        slot: which of the SLOTS sets of names, addresses and ports is taken; -1 before `up`.
    """

    directory: Path
    nodes: int = 2
    cpus: int = 8
    memory: int = 8000
    gpus: int = 2
    mode: str = "auto"
    accounting: str = "auto"
    slot: int = -1

    def __post_init__(self) -> None:
        self.directory = Path(self.directory).absolute()
        if not 1 <= self.nodes <= MOST_NODES:
            raise ClusterError(f"nodes = {self.nodes}: between 1 and {MOST_NODES} are possible")
        if len(str(self.munge_socket)) > LONGEST_SOCKET_PATH:
            raise ClusterError(
                f"{self.directory}: too long a path for the sockets below it; choose a shorter directory"
            )

    @property
    def conf(self) -> Path:
        return self.directory / "etc" / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.directory / "munge" / "munge.socket"

    @property
    def node_names(self) -> list[str]:
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    @property
    def prefix(self) -> str:
        """First letters of the cluster's bridge, links and namespaces. Interface names have at most 15 letters."""
        return f"dts{self.slot}"

    @property
    def network(self) -> str:
        """The first three numbers of the /24 network; the login node is .1."""
        return f"10.213.{self.slot}"

    def address(self, node: str) -> str:
        return f"{self.network}.{10 + self.index(node)}" if self.mode == "netns" else "127.0.0.1"

    def port(self, of: str) -> int:
        """Port of slurmctld, slurmdbd, mariadbd or a node's slurmd."""
        services = ("slurmctld", "slurmdbd", "mariadbd")
        return FIRST_PORT + 64 * self.slot + (services.index(of) if of in services else 10 + self.index(of))

    def index(self, node: str) -> int:
        if node not in self.node_names:
            raise ClusterError(f"no node named {node}: there are {', '.join(self.node_names)}")
        return self.node_names.index(node) + 1

    @property
    def environment(self) -> dict[str, str]:
        """What sbatch, srun and the commands of this package need to find this cluster."""
        return {"SLURM_CONF": str(self.conf), VARIABLE + "DIRECTORY": str(self.directory)}

    def save(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**asdict(self), "directory": str(self.directory)}, indent=1)
        (self.directory / "settings.json").write_text(text)

    @classmethod
    def load(cls, directory: Path) -> Settings | None:
        """The settings `up` left in the lab directory; None where no cluster is."""
        try:
            saved = json.loads((directory / "settings.json").read_text())
        except FileNotFoundError:
            return None
        return cls(**{**saved, "directory": directory})

    @classmethod
    def from_environment(cls, **given: object) -> Settings:
        """Given values win over TEST_CLUSTER_*, which wins over the defaults."""
        values: dict[str, object] = {"directory": default_directory()}
        for field in fields(cls):
            text = os.environ.get(VARIABLE + field.name.upper())
            if text:
                values[field.name] = int(text) if field.type == "int" else text
        values |= {name: value for name, value in given.items() if value is not None}
        return cls(**values)  # type: ignore[arg-type]


def hold(slot: int) -> socket.socket | None:
    """Take a slot for as long as the socket is open in any process; None when it is taken.

    An abstract Unix socket is seen by every user of this network namespace, which is what ports and links are shared
    in, and its name is free again, whatever happens, once no process has it open.
    """
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0dist-train-test-cluster-{slot}")
    except OSError:
        holder.close()
        return None
    return holder


@contextmanager
def free_slot(settings: Settings) -> Iterator[socket.socket]:
    """Find a slot nobody uses, set `settings.slot`, and give the socket that holds it.

    Raises:
        ClusterError: all slots are taken.
    """
    start = int.from_bytes(hashlib.sha256(str(settings.directory).encode()).digest()[:4], "big")
    for step in range(SLOTS):
        settings.slot = (start + step) % SLOTS
        holder = hold(settings.slot)
        if holder is None:
            continue
        with holder:
            if free(settings):
                yield holder
                return
    raise ClusterError(f"all {SLOTS} sets of names, addresses and ports are taken on this machine")


def free(settings: Settings) -> bool:
    """Whether the slot's ports, network and names are unused by anything else, too."""
    for port in [*map(settings.port, ("slurmctld", "slurmdbd", "mariadbd")), *map(settings.port, settings.node_names)]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                return False
    if settings.mode == "ports":
        return True
    shown = ""
    for command in (["ip", "-o", "address"], ["ip", "route"], ["ip", "netns"]):
        shown += subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return f" {settings.network}." not in shown and f"{settings.prefix}-" not in shown
