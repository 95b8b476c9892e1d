"""The configuration files of a test cluster: slurm.conf, gres.conf, cgroup.conf, slurmdbd.conf, hosts, resolv.conf."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

from tests.slurm.cluster_settings import ClusterError, Settings

# Character devices every machine has: pretended GPUs where no device may be made.
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}({login})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire seconds (default 120). It must stay well above KillWait: a node that returns after a
# network cut still kills the job's old run, and would kill the new one, which has the same id.
AuthInfo=socket={munge},cred_expire=8
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool/%n
SlurmctldPidFile={lab}/run/slurmctld.pid
SlurmdPidFile={lab}/run/slurmd-%n.pid
SlurmctldLogFile={lab}/log/slurmctld.log
SlurmdLogFile={lab}/log/%n.log
PlugStackConfig={lab}/etc/plugstack.conf
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
# no cgroups: a container may have none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
# the nodes have the CPUs, memory and GPUs that their lines below say, whatever the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# short times, so that faults are seen in seconds
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=2
UnkillableStepTimeout=60
InactiveLimit=0
MinJobAge=3600
# ids go on from cluster to cluster: a log folder named by the id is never found full of another job's files
FirstJobId={first_job}
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a preempted job gets the signal it asked for with --signal, at the start of its GraceTime
SlurmctldParameters=preempt_send_user_signal
{accounting}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=120 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=120 DefaultTime=10 PriorityTier=100 PreemptMode=OFF
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass=socket={munge}
AccountingStoreFlags=job_comment
AccountingStorageTRES=gres/gpu"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
PidFile={lab}/run/slurmdbd.pid
LogFile={lab}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""


def host() -> str:
    return socket.gethostname().partition(".")[0]


def user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise ClusterError(f"user id {os.getuid()} has no name in /etc/passwd, which Slurm needs") from None


def make_directories(settings: Settings) -> None:
    for name in ("etc", "run", "log", "state", "spool", "munge", "dev", *(f"spool/{n}" for n in settings.node_names)):
        (settings.directory / name).mkdir(parents=True, exist_ok=True)
        (settings.directory / name).chmod(0o755)


def write(settings: Settings) -> None:
    """Write every file but slurmdbd.conf, and make the GPUs' devices.

    Raises:
        ClusterError: more GPUs than this user can find devices for, or a user without a name.
    """
    lab = settings.directory
    accounting = "# no accounting: sacct refuses"
    if settings.accounting == "dbd":
        accounting = ACCOUNTING.format(port=settings.port("slurmdbd"), munge=settings.munge_socket)
    settings.conf.write_text(
        SLURM_CONF.format(
            host=host(),
            login=f"{settings.network}.1" if settings.mode == "netns" else "127.0.0.1",
            port=settings.port("slurmctld"),
            user=user(),
            munge=settings.munge_socket,
            lab=lab,
            first_job=int(time.time()) % 60_000_000,
            accounting=accounting,
            nodes="\n".join(node_line(settings, node) for node in settings.node_names),
        )
    )
    shutil.copy(settings.conf, settings.conf.with_suffix(".first"))
    (lab / "etc/gres.conf").write_text("".join(f"Name=gpu File={gpu_device(lab, i)}\n" for i in range(settings.gpus)))
    # slurmd sets up a cgroup plugin even where nothing uses it and fails where it finds no cgroups: name one that
    # does nothing until it is used
    plugin = "cgroup/v1" if version() < (24, 5) else "disabled"
    (lab / "etc/cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
    (lab / "etc/plugstack.conf").write_text("")
    (lab / "etc/hosts").write_text(hosts(settings))
    # no name server can be reached from a node, and asking one takes 10 s without this
    (lab / "etc/resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")


def change(settings: Settings, parameters: dict[str, object]) -> None:
    """Write slurm.conf anew with other values for some parameters."""
    text = settings.conf.with_suffix(".first").read_text()
    for name, value in parameters.items():
        text = re.sub(rf"(?m)^{name}=.*\n", "", text)
        text = f"{name}={value}\n{text}"
    settings.conf.write_text(text)


def node_line(settings: Settings, node: str) -> str:
    where = "" if settings.mode == "netns" else f" NodeHostname={host()}"
    gres = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    return (
        f"NodeName={node}{where} NodeAddr={settings.address(node)} Port={settings.port(node)}"
        f" CPUs={settings.cpus} RealMemory={settings.memory}{gres} State=UNKNOWN"
    )


def gpu_device(lab: Path, index: int) -> Path:
    """A GPU needs a character device of its own, or its node is refused; no driver needs to be behind it."""
    device = lab / "dev" / f"gpu{index}"
    if not device.exists():
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        except PermissionError:
            if index >= len(DEVICES):
                raise ClusterError(
                    f"without the right to make devices at most {len(DEVICES)} GPUs are possible"
                ) from None
            return Path("/dev") / DEVICES[index]
    return device


def version() -> tuple[int, int]:
    """Slurm's year and month, (22, 5) for 22.05.8."""
    text = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    if found is None:
        raise ClusterError(f"slurmd -V gives no version: {text!r}")
    return int(found[1]), int(found[2])


def hosts(settings: Settings) -> str:
    """/etc/hosts as the nodes see it (netns): the machine's own, the machine's name at its address for the nodes."""
    kept = [line for line in Path("/etc/hosts").read_text().splitlines() if host() not in line.split()]
    names = [f"{settings.network}.1 {host()} login"]
    names += [f"{settings.address(node)} {node}" for node in settings.node_names]
    return "\n".join([*kept, *names, ""])


def slurmdbd_conf(settings: Settings, password: str) -> str:
    return SLURMDBD_CONF.format(
        munge=settings.munge_socket,
        host=host(),
        port=settings.port("slurmdbd"),
        user=user(),
        lab=settings.directory,
        sql_port=settings.port("mariadbd"),
        password=password,
    )
