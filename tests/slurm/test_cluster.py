"""The test cluster itself: it is a cluster, its faults are faults, several live side by side, and nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster_lifecycle import Cluster
from tests.slurm.cluster_nodes import namespaces_possible
from tests.slurm.cluster_processes import running, wait_for
from tests.slurm.cluster_settings import CHECKOUT, ClusterError, Settings, hold
from tests.slurm.conftest import LabCluster, take_down_leftovers

pytestmark = pytest.mark.slurm
MODES = ["netns", "ports"]


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    assert wait_for(lambda: bool(condition()), seconds), f"waited {seconds} s for {what}"


def submit(script: str, *options: str) -> str:
    command = ["sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, as sockets need."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def processes_of(directory: Path) -> list[str]:
    """Every process whose command line or environment names the lab directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:
            continue
        if any(str(directory).encode() in text for text in texts) and running(int(entry.name)):
            found.append(texts[0].replace(b"\0", b" ").decode())
    return found


def assert_nothing_left(settings: Settings) -> None:
    assert processes_of(settings.directory) == []
    if shutil.which("ip"):
        for what in (["link"], ["address"], ["netns"]):
            shown = subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout
            assert f"{settings.prefix}v" not in shown
            assert f"{settings.prefix}:" not in shown
            assert f"{settings.prefix}-" not in shown
            assert f"{settings.network}." not in shown
    assert str(settings.directory) not in Path("/etc/hosts").read_text()
    assert {entry.name for entry in settings.directory.iterdir()} <= {"log", "owner"}
    free_again = hold(settings.slot)
    assert free_again is not None
    free_again.close()


def test_srun_reaches_two_machines(idle_cluster: LabCluster) -> None:
    lines = idle_cluster.slurm(
        "srun", "-N2", "-l", "bash", "-c", "echo $SLURMD_NODENAME $(hostname) $$ $(ls /dev/shm | wc -l)"
    ).splitlines()
    nodes, hosts, _, _ = zip(*(line.split()[1:] for line in sorted(lines)), strict=True)
    assert nodes == ("node1", "node2")
    if idle_cluster.mode == "netns":
        assert hosts == nodes
        seen = idle_cluster.exec(
            "node2", sys.executable, "-c", "import os; print(*filter(str.isdigit, os.listdir('/proc')))"
        )
        assert len(seen.split()) < 10  # its own processes only


def test_gpus_are_handed_out(idle_cluster: LabCluster) -> None:
    both = idle_cluster.slurm("srun", "-N2", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert both.split() == ["0,1", "0,1"]
    one_each = "srun -n1 --gres=gpu:1 --exact bash -c 'echo $CUDA_VISIBLE_DEVICES; sleep 1' & " * 2 + "wait"
    shared = idle_cluster.slurm("srun", "-N1", "-n1", "--gres=gpu:2", "--overlap", "printenv", "SLURM_GPUS_ON_NODE")
    assert shared.split() == ["2"]
    batch = subprocess.run(
        ["salloc", "-Q", "-N1", "-n2", "--gres=gpu:2", "bash", "-c", one_each],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(batch.stdout.split()) == ["0", "1"]
    too_many = idle_cluster.attempt("srun", "--gres=gpu:3", "true")
    assert "not available" in too_many.stderr


def test_without_accounting_sacct_refuses(cluster_without_accounting: LabCluster) -> None:
    refused = subprocess.run(["sacct"], capture_output=True, text=True, check=False)
    assert refused.returncode
    assert "Slurm accounting storage is disabled" in refused.stderr
    assert cluster_without_accounting.slurm("srun", "printenv", "SLURM_JOB_NODELIST") == "node1\n"


def test_power_cut_and_return(idle_cluster: LabCluster, tmp_path: Path) -> None:
    beat = f"[ $SLURM_PROCID = 0 ] || while true; do date > {tmp_path}/beat; sleep .1; done"
    run = f"echo $SLURMD_NODENAME $SLURM_RESTART_COUNT >> {tmp_path}/started; {beat} & sleep 60"
    job = submit(f"srun bash -c '{run}'", "-N2", "--requeue")

    def starts() -> list[str]:
        started = tmp_path / "started"
        return sorted(started.read_text().split("\n")[:-1]) if started.exists() else []

    until(lambda: len(starts()) == 2 and (tmp_path / "beat").exists(), 20, "both ranks")
    idle_cluster.crash("node2")
    (tmp_path / "beat").unlink()
    time.sleep(0.5)
    assert not (tmp_path / "beat").exists()  # though it detached itself
    # Slurm would see it by itself in half a minute
    idle_cluster.slurm("scontrol", "update", "nodename=node2", "state=down", "reason=crash")
    until(lambda: idle_cluster.states()["node2"].startswith("down"), 5, "node2 down")
    idle_cluster.revive("node2")
    until(lambda: len(starts()) == 4, 40, "the requeued job on both nodes")
    assert starts() == ["node1", "node1 1", "node2", "node2 1"]
    assert idle_cluster.jobs() == [f"{job} RUNNING None"]


def test_sacct_tells_of_an_ended_job(idle_cluster: LabCluster) -> None:
    if idle_cluster.settings.accounting != "dbd":
        pytest.skip("slurmdbd or MariaDB is not installed")
    job = submit("exit 3", "-J", "ended")
    ask = ("sacct", "-n", "-P", "-X", "-j", job, "-o", "JobName,State,ExitCode")
    until(lambda: idle_cluster.slurm(*ask).strip() == "ended|FAILED|3:0", 20, "sacct to know the job's end")
    idle_cluster.stop_accounting()
    assert idle_cluster.attempt(*ask).returncode
    idle_cluster.clean()
    assert idle_cluster.slurm(*ask)


def test_network_cut_and_back(idle_cluster: LabCluster) -> None:
    if idle_cluster.mode != "netns":
        pytest.skip("a network cut needs nodes with their own network")
    settings = idle_cluster.settings
    port = settings.port("node1")
    dial = f"import socket; print(len(socket.create_connection(('node1', {port}), 1).getpeername()))"
    assert idle_cluster.exec("node2", sys.executable, "-c", dial)
    idle_cluster.cut("node1")
    with pytest.raises(ClusterError, match="timed out"):
        idle_cluster.exec("node2", sys.executable, "-c", dial)
    idle_cluster.heal("node1")
    until(
        lambda: idle_cluster.attempt(*idle_cluster.machines.command("node2", [sys.executable, "-c", dial])).stdout,
        5,
        "it",
    )


def test_job_outlives_the_controller(idle_cluster: LabCluster, tmp_path: Path) -> None:
    job = submit(f"echo running > {tmp_path}/state; sleep 2; echo ended > {tmp_path}/state")
    state = tmp_path / "state"
    until(state.exists, 20, "the job")
    idle_cluster.stop_controller()
    assert idle_cluster.attempt("scontrol", "ping").returncode
    until(lambda: state.read_text() == "ended\n", 10, "the job's end")
    idle_cluster.start_controller()
    until(
        lambda: idle_cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T") == "COMPLETED\n", 20, "the news"
    )


def test_clean_undoes_what_a_test_left(idle_cluster: LabCluster) -> None:
    idle_cluster.drain("node1")
    idle_cluster.slurm("scontrol", "update", "partitionname=high", "state=down", "maxtime=1")
    idle_cluster.configure(EnforcePartLimits="ALL")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        submit("true", "-t", "1000")
    assert "time limit is invalid" in refused.value.stderr
    submit("sleep 60")
    idle_cluster.stop_controller(kill=True)
    idle_cluster.crash("node2")
    idle_cluster.clean()
    assert idle_cluster.states() == {"node1": "idle", "node2": "idle"}
    assert idle_cluster.slurm("sinfo", "-h", "-p", "high", "-o", "%a %l") == "up 2:00:00\n"
    job = submit("true", "-t", "1000")  # accepted, and never starts
    until(lambda: "PENDING" in idle_cluster.jobs()[0], 5, job)


@pytest.mark.parametrize("mode", MODES)
def test_side_by_side_and_nothing_left(idle_cluster: LabCluster, directory: Path, mode: str, tmp_path: Path) -> None:
    if mode == "netns" and not namespaces_possible():
        pytest.skip("no right to make namespaces here")
    other = Cluster(Settings(directory, nodes=3, gpus=1, mode=mode, accounting="none"))
    other.up()
    try:
        assert other.settings.slot != idle_cluster.settings.slot
        names = other.slurm("srun", "-N3", "printenv", "SLURMD_NODENAME").split()
        assert sorted(names) == ["node1", "node2", "node3"]
        loose = f"setsid bash -c 'echo $$ > {tmp_path}/pid; sleep 50' & sleep 50"
        other.slurm("sbatch", "-w", "node3", "-o", "/dev/null", "--wrap", loose)
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 20, "the job")
        other.crash("node3")
        assert len(processes_of(tmp_path)) == 0
        if mode == "ports" and os.access("/etc/hosts", os.W_OK):
            assert socket.gethostbyname("node3") == "127.0.0.1"
        again = Cluster(Settings(directory, nodes=1, mode=mode, accounting="none"))
        again.up()  # takes the leftover down first
        other = again
    finally:
        other.down()
    assert_nothing_left(other.settings)
    assert idle_cluster.states() == {"node1": "idle", "node2": "idle"}


def test_failed_up_takes_itself_down_and_names_the_log(directory: Path) -> None:
    broken = Cluster(Settings(directory, nodes=1, memory=-1, accounting="none"))
    with pytest.raises(ClusterError, match=f"{directory}/log/"):
        broken.up()
    assert_nothing_left(broken.settings)


def test_run_gives_the_commands_exit_code(directory: Path) -> None:
    """With nothing but the standard library (-S), and taken down when it is terminated."""
    command = [sys.executable, "-S", "-m", "tests.slurm.cluster", "run", "--accounting", "none", "--nodes", "1"]
    command += ["--directory", str(directory), "bash", "-c"]
    done = subprocess.run(
        [*command, "srun hostname; exit 7"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split()
    process = subprocess.Popen([*command, f"touch {directory}/ready; sleep 60"], cwd=CHECKOUT)
    until((directory / "ready").exists, 20, "the command")
    settings = Settings.load(directory)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert settings is not None
    (directory / "ready").unlink()
    assert_nothing_left(settings)


def test_cluster_of_a_killed_session_is_taken_down() -> None:
    hang = "import time; from tests.slurm.conftest import started; it = started(nodes=1, accounting='none')\n"
    hang += "print(next(it).settings.directory, flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", hang], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    left = Path(process.stdout.readline().strip())
    settings = Settings.load(left)
    assert settings is not None
    take_down_leftovers()
    assert processes_of(left)
    process.kill()
    process.wait()
    take_down_leftovers()
    assert not left.exists()
    left.mkdir()
    assert_nothing_left(settings)
    left.rmdir()
