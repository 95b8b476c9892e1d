"""Which world a process is in, from the variables of torchrun and srun."""

from __future__ import annotations

import pytest

from sharding.errors import UserError
from sharding.world import World, first_host, read_world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip


def test_torchrun() -> None:
    assert read_world(TORCHRUN) == World(3, 8, 1, "node1", 29500)


def test_srun_gives_every_rank_the_same_meeting_point() -> None:
    one, other = read_world(SRUN), read_world({**SRUN, "SLURM_PROCID": "6", "SLURM_LOCALID": "2"})
    assert one is not None and other is not None
    assert (one.rank, one.size, one.local_rank, one.master_address) == (5, 8, 1, "gpu03")
    assert (one.master_address, one.master_port) == (other.master_address, other.master_port)
    next_job = read_world({**SRUN, "SLURM_JOB_ID": "4712"})
    assert next_job is not None and next_job.master_port != one.master_port


def test_torchrun_inside_srun_wins() -> None:
    world = read_world({**SRUN, **TORCHRUN})
    assert world is not None and world.size == 8 and world.rank == 3


def test_alone() -> None:
    assert read_world({"PATH": "/bin"}) is None


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": str(2**32 - 5)}], ids=["no step", "batch script"])
def test_a_batch_script_is_no_rank(step: dict[str, str]) -> None:
    """sbatch sets SLURM_NTASKS and SLURM_PROCID=0 in its script too; joining there would wait for ever."""
    environment = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert read_world({**environment, **step}) is None


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_partial_environment_names_what_is_missing(missing: str) -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UserError, match=missing):
        read_world(environment)


def test_a_partial_srun_names_what_is_missing() -> None:
    environment = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        read_world(environment)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("node2,node1", "node2"),
        ("gpu[03-07,12],login1", "gpu03"),
        ("gpu[12,03-07]", "gpu12"),
        ("rack[0-3]n[07-09]", "rack0n07"),
        ("a1-b[2-3].cluster,c4", "a1-b2.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    """As `scontrol show hostnames` has it."""
    assert first_host(nodelist) == first
