"""The GPU benchmark, in small on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_gpu import CASES, recipe_of


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_recipe(case: str) -> None:
    real, tiny = recipe_of(case, "real", "bf16"), recipe_of(case, "tiny", "fp32")
    assert real.text.config is not None and real.text.config["hidden_size"] == 4096
    assert real.simulation == tiny.simulation and real.text.quantisation == tiny.text.quantisation


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench_gpu", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_runs_in_small(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--size", "tiny", "--steps", "2", "--warm-up", "1", "--clips", "3"]
    done = bench("generate", "nf4", *small, "--output", str(tmp_path / "out"), "--trace", str(tmp_path / "traces"))
    assert done.returncode == 0, done.stderr
    found = {row["case"]: row for row in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert found.keys() == {"generate", "nf4"}
    for row in found.values():
        assert 0 < row["mfu"] < 1 and row["step_seconds"] > 0 and row["foretold_peak_bytes"] > 0
        assert row["packages"]["torch"] and row["date"]
    assert found["generate"]["phases"]["rollout"] > 0 and found["nf4"]["phases"].get("rollout", 0.0) < 0.01
    assert {path.name for path in (tmp_path / "traces").iterdir()} == {"generate.json.gz", "nf4.json.gz"}


def test_mistakes_are_told() -> None:
    assert "the cases are lora" in bench("lara", "--device", "cpu").stderr
