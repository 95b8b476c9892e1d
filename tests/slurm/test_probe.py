"""The probe tells what Slurm is there, and never hangs or raises when there is none."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from slurm.probe import COMMANDS, SINFO_FORMAT, parse_partitions, probe
from tests.slurm.cluster import Cluster


def install(folder: Path, scripts: dict[str, str]) -> None:
    """Put shell scripts named like Slurm's commands into `folder`."""
    for name, body in scripts.items():
        script = folder / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_without_slurm(commands: Path) -> None:
    status = probe()
    assert not status.found
    assert not status.reachable
    assert status.problem == "not found"
    assert status.commands == dict.fromkeys(COMMANDS)


def test_half_an_installation_is_named(commands: Path) -> None:
    install(commands, {"sinfo": "exit 0", "srun": "exit 0"})
    status = probe()
    assert not status.found
    assert status.problem == "sbatch not found on PATH"


def test_silent_controller_does_not_hang(commands: Path) -> None:
    install(commands, {"sbatch": "", "srun": "", "sacct": ""})
    install(commands, {"sinfo": '[ "$1" = --version ] && echo slurm-wlm 99.1 && exit 0\nexec /bin/sleep 30'})
    started = time.monotonic()
    status = probe(timeout=0.5)
    assert time.monotonic() - started < 10
    assert status.found
    assert status.version == "slurm-wlm 99.1"
    assert not status.reachable
    assert "no answer within 0.5 s" in status.problem


def test_complaint_of_the_controller_is_passed_on(commands: Path) -> None:
    install(commands, {"sbatch": "", "srun": "", "sinfo": "echo first >&2\necho cannot contact controller >&2\nexit 1"})
    status = probe()
    assert status.version is None
    assert status.problem == "controller not reachable: cannot contact controller"


def test_accounting_off_and_down_partition(commands: Path) -> None:
    install(commands, {"sbatch": "", "srun": "", "sacct": "echo Slurm accounting storage is disabled >&2\nexit 1"})
    install(commands, {"sinfo": '[ "$1" = --version ] && echo slurm 23.02 || echo "old*|down|1:00:00|3|(null)|idle"'})
    status = probe()
    assert status.reachable
    assert not status.accounting
    assert status.problem == "no partition is up"
    assert [(partition.name, partition.available) for partition in status.partitions] == [("old", False)]


def test_groups_of_nodes_are_merged_by_partition() -> None:
    draw = random.Random()
    states = ["idle", "alloc", "down*", "mix"]
    gres = ["gpu:a100:4(S:0-1)", "(null)", "gpu:h100:8,shard:16"]
    rows = [(name, draw.randint(0, 40), draw.choice(gres), draw.choice(states)) for name in "abc" * 4]
    text = "\n".join(f"{n}{'*' * (n == 'b')}|up|1-00:00:00|{count}|{g}|{s}" for n, count, g, s in rows)
    parsed = {partition.name: partition for partition in parse_partitions("sinfo: a plug-in talks\n" + text)}
    assert list(parsed) == ["a", "b", "c"]
    for name, partition in parsed.items():
        mine = [row for row in rows if row[0] == name]
        assert partition.nodes == sum(row[1] for row in mine) == sum(partition.states.values())
        assert set(partition.gres) == {row[2] for row in mine} - {"(null)"}
        assert partition.default is (name == "b")
        assert partition.time_limit == "1-00:00:00"


@pytest.mark.slurm
def test_real_slurm(idle_cluster: Cluster) -> None:
    status = probe()
    assert status.reachable
    assert not status.problem
    assert status.version is not None
    assert status.accounting is (idle_cluster.settings.accounting == "dbd")
    names = idle_cluster.slurm("sinfo", "-h", "-a", "-o", "%R").split()
    assert {partition.name for partition in status.partitions} == set(names)
    first = status.partitions[0]
    assert f"TotalNodes={first.nodes}" in idle_cluster.slurm("scontrol", "show", "partition", first.name)
    assert (first.name, first.default, first.states) == ("main", True, {"idle": len(idle_cluster.nodes)})
    assert SINFO_FORMAT.count("|") == 5
