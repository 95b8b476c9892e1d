"""Status, logs and cancel of run directories whose files are damaged, or are no files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import call
from tests.slurm.laid import AGAIN, JOB, Laid

NASTY = [
    b"", b"\0" * 50, b"[" * 100_000, b"{}", b"null", b"[[1, 2], 3]", b'{"job": 1}', b"\xff\xfe", b"- - -", b"1e999",
    b'[{"phase": "x", "step": 1e400}]', b'{"kind": "step", "step": 9999999999999999999999, "loss": NaN}\n' * 3,
    b'{"kind": "step", "step": 3, "loss": NaN, "step_seconds": -1, "total_steps": "x", "epoch": true}\n',
    b'[["a"], ["b", "c", "d", "e"]]', b"training: [1]", b"training: {epochs: .nan, watchdog_seconds: x}", b"a: *b",
    b'{"training": {"epochs": 1}}' + b"\n" * 3000,
]  # fmt: skip


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def forever(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


WRONG: list[Callable[[Path], object]] = [folder, loop, forever, os.mkfifo, terabyte]
WRONG += [lambda path, text=text: path.write_bytes(text) for text in NASTY]  # type: ignore[misc]
PLACES = (
    "recipe.yaml", "metrics.jsonl", "summary.json", "environment.json", "logs/heartbeat.json", "logs/rank_0.error.json",
    "logs/rank_0.stacks.txt", "slurm/submissions.jsonl", "slurm/attempts.jsonl", "slurm/cancelled", "checkpoints/last",
    f"slurm/attempts/{JOB}.0/rank_1.error.json", f"slurm/jobs/1/{JOB}_0_log.err", "slurm", "logs",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_damaged_files_are_told_and_nothing_breaks(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file as a FIFO, a link in a circle, terabytes, garbage, JSON of other things."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for number, ruin in enumerate(random.sample(WRONG, 6)):
        laid = Laid(tmp_path / f"run{number}")
        laid.steps(4)
        if place not in ("environment.json", "logs/rank_0.error.json"):
            laid.submitted(JOB)
        laid.attempt(JOB, **AGAIN)
        laid.reported(JOB, 0, 1, ["a", "b", "c"])
        laid.log(JOB, 0, "err", "text\n")
        laid.beats("n1:7")
        laid.saved(2)
        laid.finished(ago=500)
        path = laid.path / place
        if path.is_dir() and not path.is_symlink():
            path.rename(laid.path / "aside")
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        ruin(path)
        logs = random.choice(["--rank=0", "--all"])
        for words in (["status"], ["status", "--json"], ["logs", logs], ["logs", "--errors"], ["cancel"]):
            capsys.readouterr()
            code = call(*words, laid.path)
            out, err = capsys.readouterr()
            assert code in (0, 2) and (code == 0 or err.startswith("error: ")), (words, ruin, err)
            if code == 0 and words == ["status", "--json"]:
                (data,) = json.loads(out, parse_constant=pytest.fail)
                assert data["state"]
