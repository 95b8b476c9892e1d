"""The same command without Slurm: a run in the background of this machine that restarts by itself."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from slurm.record import LaunchRecord
from tests.end_to_end.commands import run
from tests.faults.rounds import outcome
from tests.slurm.runs import write_tiny


@pytest.mark.slow
def test_local_run_survives_the_death_of_a_rank(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path, epochs=4)
    results = []
    for name in ("killed", "undisturbed"):
        output = tmp_path / name
        words = ("--output", output, "--cluster", "local", "--gpus-per-node", "0", "--ranks-per-node", "2")
        done = run("submit", recipe, *words)
        assert done.returncode == 0 and f"dist-train status {output}" in done.stdout, done.stderr
        record = LaunchRecord(output)
        deadline = time.monotonic() + 200
        killed = name != "killed"
        while not (record.read_attempts() and record.read_attempts()[-1].decision in ("done", "stop")):
            assert time.monotonic() < deadline, [path.read_text()[-2000:] for path in record.jobs.glob("*/*_log.*")]
            if not killed and (output / "checkpoints/last").exists():
                killed = kill_rank(1, output)
                assert killed, "no such rank"
            time.sleep(0.05)
        attempts = record.read_attempts()
        assert [attempt.decision for attempt in attempts] == ["requeue"] * (name == "killed") + ["done"]
        results.append(outcome(output))
    assert results[0] == results[1]


def kill_rank(rank: int, output: Path) -> bool:
    """SIGKILL to a local rank of that run. Returns whether there is one."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"slurm.job" in words and str(output).encode() in words and f"RANK={rank}".encode() in variables:
            os.kill(int(process.name), signal.SIGKILL)
            return True
    return False
