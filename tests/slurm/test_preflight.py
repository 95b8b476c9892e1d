"""The preflight in real worlds with real faults: hidden mounts, damaged shards, slow and cut links, stopped ranks."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train.recipe import write_recipe
from sharding.errors import UserErrors
from sharding.launch import run_local
from slurm.preflight.device import SIZE, Device, Smi, entries, judge_devices, parse_smi
from slurm.preflight.examine import Preflight, run_checks
from slurm.preflight.findings import Finding, severity_of
from slurm.preflight.shards import file_system_of
from slurm.preflight.tournament import outliers, rounds
from tests import tiny
from tests.end_to_end.commands import command, run
from tests.ranks import run_ranks

WORK: Any = {"module": "tests.slurm.work_preflight", "deepspeed": False}
SOURCE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("preflight") / "shards", train=40)


def told(findings: list[Any], severity: str) -> set[tuple[str, str]]:
    """Node and check of the findings of a severity."""
    rows = [one if isinstance(one, dict) else vars(one) for one in findings]
    return {(one["node"], one["check"]) for one in rows if one["severity"] == severity}


def per_rank(cases: dict[int, str]) -> list[str]:
    """A command that runs another one, in some ranks after other shell commands; node names are node0, node1 …"""
    branches = "".join(f"{rank}) {commands} ;; " for rank, commands in cases.items())
    return ["bash", "-ec", f'export SLURMD_NODENAME=node$RANK; case $RANK in {branches} esac; exec "$@"', "rank"]


def privately(mounts: str) -> str:
    """Shell commands that run the rest in a mount namespace of its own with these mounts."""
    flags = "-m" if os.getuid() == 0 else "-rm"
    if shutil.which("unshare") is None or subprocess.run(["unshare", flags, "true"], check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    return f'exec unshare {flags} bash -ec \'{mounts}; exec "$@"\' - "$@"'


def test_eight_ranks_are_examined_in_time(shards: Path, tmp_path: Path) -> None:
    write_recipe(tiny.recipe(shards, data={"batch": 16}), tmp_path / "recipe.yaml")
    done = run("preflight", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--ranks", "8")
    assert done.returncode == 0, done.stderr
    assert "Preflight of 8 ranks on 1 node" in done.stdout
    found = Preflight.model_validate_json((tmp_path / "run/slurm/preflight.json").read_text())
    assert found.findings == [] and found.silent == [] and len(found.devices) == 8
    print(found.seconds)
    assert found.seconds["all"] < 30
    assert found.network is not None and found.network.rounds == (7, 7)
    assert found.shards[str(shards)] == len(list(shards.glob("*.tar")))  # one sample of each tar, over the ranks


def test_two_nodes_of_two_ranks(shards: Path, tmp_path: Path) -> None:
    prefix = ["bash", "-c", 'export SLURMD_NODENAME=node$((RANK / 2)); exec "$@"', "rank"]
    every = run_ranks("repeated", 4, tmp_path, **WORK, prefix=prefix, shards=str(shards), times=2)
    assert every[1:] == every[:1] * 3  # the same on all ranks
    found = Preflight.model_validate(every[0])
    assert found.good and found.nodes == ["node0", "node0", "node1", "node1"]
    network = found.network
    assert network is not None and [link.between for link in network.links] == [("node0", "node1")]
    assert {*network.inside} == {*network.all_reduce_of_node} == {"node0", "node1"}
    assert network.all_reduce is not None and 0 < network.all_reduce.seconds < 1
    assert all(abs(skew.ahead) < 0.5 and skew.within < 0.5 for skew in found.skew.values())
    assert not list(tmp_path.glob("run/slurm/preflight_*"))  # its own files are gone


def test_what_is_wrong_on_a_node_is_named_with_it(shards: Path, tmp_path: Path) -> None:
    """Of five nodes one does not see the shards, one sees damaged ones and has a wrong clock, one has other code, and
    in one a check raises.
    """
    shutil.copytree(shards, tmp_path / "damaged")
    for tar in (tmp_path / "damaged").glob("train*.tar"):
        tar.write_bytes(random.randbytes(tar.stat().st_size))
    for copy in ("other", "broken"):
        for package in ("sharding", "dist_train", "slurm", "tools", "tests"):
            shutil.copytree(SOURCE / package, tmp_path / copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other/tools/new.py").write_text("")
    (tmp_path / "broken/tools/folder.py").mkdir()  # reading the code for its hash raises
    prefix = per_rank(
        {
            1: privately(f"mount -t tmpfs none {shards}"),
            2: privately(f"mount --bind {tmp_path}/damaged {shards}"),
            3: f"cd {tmp_path}/other",
            4: f"cd {tmp_path}/broken",
        },
    )
    every = run_ranks("shifted", 5, tmp_path, **WORK, prefix=prefix, shards=str(shards), rank=2, ahead=90.0)
    assert every[1:] == every[:1] * 4
    findings = every[0]["findings"]
    assert told(findings, "bad node") == {("node1", "shards"), ("node2", "shards"), ("node4", "versions")}
    assert told(findings, "stop") == {("node3", "versions")} and told(findings, "note") == {("node2", "clock")}
    text = {(one["node"], one["rank"]): one["problem"] for one in findings if one["check"] != "clock"}
    assert f"{shards} is not a shard directory" in text["node1", 1]
    assert "train-00000" in text["node2", 2] and "checksum" in text["node2", 2]
    ahead, within = every[0]["skew"]["node2"]
    assert abs(ahead - 90) <= within + 0.1 < 1
    assert text["node3", 3].startswith("code is ") and "folder.py" in text["node4", 4]


def test_a_run_directory_on_a_small_local_disk(shards: Path, tmp_path: Path) -> None:
    write_recipe(tiny.recipe(shards, data={"batch": 16}), tmp_path / "recipe.yaml")
    (tmp_path / "run").mkdir()
    prefix = per_rank({0: privately(f"mount -t tmpfs -o size=1M none {tmp_path}/run")})
    with pytest.raises(UserErrors) as told_at_the_end:
        words = ("preflight", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
        run_local([*prefix, *command(*words)], 3, tmp_path / "logs")
    space, directory = sorted(map(str, told_at_the_end.value.errors))
    assert space.startswith("node0: space: a checkpoint takes") and space.endswith("or give another --output.")
    assert directory.startswith(f"node1: run directory: {tmp_path}/run does not show what was written there by rank 0")
    assert "tmpfs there" in directory and "node1, node2" in directory and "--output" in directory


@pytest.mark.parametrize(
    ("rank", "how"),
    [(1, "stops"), pytest.param(0, "stops", marks=pytest.mark.slow), pytest.param(2, "ends", marks=pytest.mark.slow)],
)
def test_a_rank_that_falls_silent(rank: int, how: str, shards: Path, tmp_path: Path) -> None:
    run_ranks("lost", 3, tmp_path, **WORK, prefix=per_rank({}), shards=str(shards), rank=rank, how=how)
    found = Preflight.model_validate_json((tmp_path / "found.json").read_text())
    assert found.bad_nodes == [f"node{rank}"] and found.silent == [rank] and len(found.findings) == 1
    assert float((tmp_path / "seconds").read_text()) < 40
    written = Preflight.model_validate_json((tmp_path / "run/slurm/preflight.json").read_text())
    assert written == found  # the stopped one, when it goes on, has nothing to add


@contextlib.contextmanager
def network(nodes: int) -> Iterator[list[str]]:
    """Network namespaces joined by a bridge; yields the shell commands that run the rest in each."""
    name, subnet = f"pf{os.getpid() % 10000}", f"10.{random.randint(64, 127)}.{random.randint(0, 255)}"

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    if shutil.which("ip") is None:
        pytest.skip("no network namespaces can be made here")
    try:
        try:
            ip("link", "add", name, "type", "bridge")
            ip("link", "set", name, "up")
            for node in range(nodes):
                own, peer = f"{name}n{node}", f"{name}p{node}"
                ip("netns", "add", own)
                ip("link", "add", peer, "type", "veth", "peer", "name", "eth0", "netns", own)
                ip("link", "set", peer, "master", name, "up")
                ip("-n", own, "addr", "add", f"{subnet}.{node + 1}/24", "dev", "eth0")
                ip("-n", own, "link", "set", "eth0", "up")
                ip("-n", own, "link", "set", "lo", "up")
        except subprocess.CalledProcessError:
            pytest.skip("no network namespaces can be made here")
        yield [
            f'export MASTER_ADDR={subnet}.1 GLOO_SOCKET_IFNAME=eth0; set -- ip netns exec {name}n{node} "$@"'
            for node in range(nodes)
        ]
    finally:
        for node in range(nodes):
            ip("netns", "del", f"{name}n{node}", check=False)
            ip("link", "del", f"{name}p{node}", check=False)
        ip("link", "del", name, check=False)


@pytest.mark.slow
def test_slow_and_cut_links(shards: Path, tmp_path: Path) -> None:
    """Of five nodes one has 20 Mbit/s; and one cannot send to another one, though both can to the rest."""
    with network(5) as entries:
        own = entries[1].split("exec ")[1].split()[0]
        shape = ["tc", "-n", own, "qdisc", "add", "dev", "eth0", "root", "tbf"]
        limit = ["rate", "20mbit", "burst", "32kbit", "latency", "400ms"]
        if shutil.which("tc") is None or subprocess.run([*shape, *limit], check=False).returncode:
            pytest.skip("tc cannot limit a link here")
        address = entries[0].split("MASTER_ADDR=")[1].split()[0].removesuffix(".1") + ".4"
        prefix = per_rank(dict(enumerate(entries)))
        found = run_ranks("cut", 5, tmp_path, **WORK, prefix=prefix, shards=str(shards), rank=2, address=address)
    findings = found[0]["findings"]
    print(findings, found[0]["seconds"])
    assert {one["check"] for one in findings} == {"network"} and {one["severity"] for one in findings} == {"bad node"}
    text = {one["node"]: one["problem"] for one in findings}
    assert "times slower than usual with every other node" in text.pop("node1")
    ((node, problem),) = text.items()
    assert node in ("node2", "node3") and f"exchanges nothing with node{5 - int(node[-1])}" in problem
    speed = max(link["bytes_per_second"] for link in found[0]["network"]["links"] if "node1" in link["between"])
    assert 1.5e6 < speed < 6e6  # 2.5 MB/s there, at once back


def test_checks_that_raise_or_hang_are_told() -> None:
    began = time.monotonic()
    checks = {"hangs": lambda: time.sleep(30), "raises": lambda: 1 / 0, "works": lambda: 3}
    found = run_checks(checks, 0.5)
    assert time.monotonic() - began < 5
    assert found["hangs"]["problem"] == "did not end within 0 s" or "within" in found["hangs"]["problem"]
    assert found["raises"]["problem"] == "failed: division by zero" and found["works"]["result"] == 3


@pytest.mark.parametrize("members", [1, 2, 3, 8, 13])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(members: int) -> None:
    played = rounds(range(members))
    pairs = [frozenset(pair) for pairs in played for pair in pairs]
    assert len(pairs) == len(set(pairs)) == members * (members - 1) // 2
    assert all(len({one for pair in pairs for one in pair}) == 2 * len(pairs) for pairs in played)
    assert len(played) == (members - 1 + members % 2 if members > 1 else 0)


def test_bad_members_and_links_are_told_from_noise() -> None:
    """Random speeds within a factor of 2; a minority is 7 times slower, and some links between others are."""
    draw = random.Random()
    for _ in range(300):
        members = draw.randint(3, 12)
        bad = set(draw.sample(range(members), draw.randint(0, (members - 1) // 2)))
        rates = {pair: draw.uniform(1, 2) for pairs in rounds(range(members)) for pair in pairs}
        good = [pair for pair in rates if not bad & {*pair}]
        worse = {draw.choice(good)} if len(good) > 5 and draw.random() < 0.5 else set()
        rates = {pair: rate / (7 if bad & {*pair} or pair in worse else 1) for pair, rate in rates.items()}
        found, links = outliers(rates)
        assert set(found) == bad and set(links) == worse, (rates, bad, worse)
    assert outliers({("a", "b"): 1e-9}) == ({}, {})  # of two, nobody can tell which


SMI = """\
Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error
GPU-a895322e-0a47-4d71-9c39-d7e6e2c0bbd1, 550.90.07, 41, 1980, 1980, 0, [N/A], Not Active, Not Active
GPU-455e672a-3b61-4d62-b0ef-2c6ff0ad8a31, 550.90.07, 91, 345, 1980, 2, [N/A], Active, Not Active
GPU-d66f99e9-51f6-a669-0d80-b4530b81b816, 550.90.07, [Unknown Error], 1980, 1980, [Not Supported], [N/A], ERR!, N/A
"""
ROWS = """\
GPU-a895322e-0a47-4d71-9c39-d7e6e2c0bbd1, 0, No, No
GPU-455e672a-3b61-4d62-b0ef-2c6ff0ad8a31, 1, Yes, No
GPU-d66f99e9-51f6-a669-0d80-b4530b81b816, 3, No, Yes
"""


def device(uuid: str, flops: float = 7e14, held: int = 2**29, wrong: int = 0) -> Device:
    return Device(
        name="NVIDIA H100", kind="cuda", uuid=uuid, products=100, wrong=wrong, flops=flops, total=2**36, held=held
    )


def test_what_nvidia_smi_says_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that does not know a field refuses the whole question, so that it is asked again without."""
    (tmp_path / "rows").write_text(ROWS)
    (tmp_path / "gpus").write_text(SMI.replace("[N/A], ", ""))
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\ncase "$1" in --query-remapped-rows=*) exec cat "${0%/*}/rows" ;; *retired_pages.pending*) '
        "echo 'Field \"retired_pages.pending\" is not a valid field to query.'; exit 2 ;; esac\n"
        'exec cat "${0%/*}/gpus"\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    from slurm.preflight.device import ask_smi  # noqa: PLC0415

    smi = ask_smi()
    assert smi is not None and smi.driver == "550.90.07" and len(smi.gpus) == 3
    devices = {rank: device(uuid) for rank, uuid in enumerate(smi.gpus)}
    findings = list(judge_devices(devices, {"node0": smi}, ["node0"] * 3))
    rows = {(one.rank, one.severity, one.problem.split(".")[0]) for one in findings}
    assert rows == {
        (None, "note", "Unable to determine the device handle for GPU0000:CB:00"),
        (1, "note", "the GPU's memory waits for a repair that only a reset carries out"),
        (1, "note", "2 uncorrected errors of the GPU's memory since the driver was loaded"),
        (1, "note", "the GPU is slowed down because it is too hot (91 °C)"),
        (2, "bad node", "a row of the GPU's memory could not be remapped"),
    }
    assert parse_smi("No devices were found\n", ["uuid", "driver_version"]) == {}


def test_devices_are_compared_with_each_other() -> None:
    nodes = ["a"] * 4 + ["b"] * 4
    devices = {rank: device(f"GPU {rank}") for rank in range(8)}
    assert list(judge_devices(devices, {}, nodes)) == []
    devices[2] = device("GPU 2", flops=3e14)
    devices[5] = device("GPU 5", held=9 * 2**30)
    devices[6] = device("GPU 7", wrong=1)
    rows = [(one.node, one.rank, one.severity, one.problem) for one in judge_devices(devices, {}, nodes)]
    assert [row[:3] for row in rows] == [
        ("b", 6, "bad node"), ("a", 2, "bad node"), ("b", 5, "bad node"), ("b", None, "stop"),
    ]  # fmt: skip
    for row, text in zip(rows, ("1 of 100", "2.3 times slower", "9.0 GiB", "same GPU"), strict=True):
        assert text in row[3]
    cpu = {0: Device(name="cpu", kind="cpu", products=1, wrong=0, flops=1e11)}
    (unused,) = judge_devices(cpu, {"a": Smi(gpus={"0": {}})}, ["a"])
    assert unused.severity == "stop" and "torch sees none" in unused.problem


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_products_of_the_matrices_are_exact_in_their_type(kind: str) -> None:
    """Sums of whole numbers below 2^8 in bf16 and 2^24 in fp32 are exact in any order; seen on a part of the rows."""
    import torch  # noqa: PLC0415

    draw = torch.Generator().manual_seed(SIZE[kind])
    a, b = (entries(SIZE[kind], draw).float() for _ in range(2))
    partial = torch.cumsum(a[:8, :, None] * b[None, :, :256], 1)
    assert 100 < partial.abs().max() <= 256 or kind == "cpu"
    assert partial.abs().max() <= 2**24


def test_file_systems_are_those_that_df_names() -> None:
    for place in ("/", "/proc", "/dev/shm", "/tmp", str(Path.home()), "/sys"):
        told = subprocess.run(["df", "--output=fstype", place], capture_output=True, text=True, check=True).stdout
        kind = told.split()[-1]
        if kind != "-":
            assert file_system_of(Path(place) / "not there") == kind, place


@pytest.mark.parametrize(
    ("failing", "nodes", "system", "severity"),
    [
        *[("a", "abc", "ext4", "bad node"), ("ab", "abc", "ext4", "stop"), ("ab", "abc", "nfs4", "bad node")],
        *[("abc", "abc", "nfs4", "stop"), ("a", "ab", None, "stop"), ("a", "ab", "lustre", "bad node")],
    ],
)
def test_whose_fault_it_is(failing: str, nodes: str, system: str | None, severity: str) -> None:
    assert severity_of(failing, nodes, system) == severity


def test_a_finding_becomes_an_error_line() -> None:
    found = Preflight(nodes=["n1"], findings=[Finding("n1", 0, "space", "no room (1. of 2). Free space.", "stop")])
    assert str(found.errors()[0]) == "n1, rank 0: space: no room (1. of 2). Free space."
    assert not found.good and found.bad_nodes == []
    assert Preflight.model_validate_json(found.model_dump_json()) == found
