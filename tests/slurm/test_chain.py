"""Commands that follow a run: `submit --then`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sharding.errors import UserError
from slurm.chain import read_chain, share_of
from slurm.queue import job_states
from slurm.record import LaunchRecord
from slurm.status import Files, gather
from tests.end_to_end.commands import call, errors
from tests.slurm.conftest import LabCluster
from tests.slurm.runs import write_tiny

MISSING = "audio={pretrained: /nowhere/model, config: null}"  # what only a rank finds out


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 10 steps."""
    return write_tiny(tmp_path_factory.mktemp("chain"), epochs=1)


def test_commands(tmp_path: Path) -> None:
    """What is left out is understood, what is wrong is told at once."""
    run = tmp_path / "my run"
    given = (
        *("evaluate", "dist-train evaluate --split valid", "evaluate {run} --json", "report", "doctor"),
        *("convert --to huggingface", "convert out --to peft", "convert --to wavlm {run}/checkpoints/best {run}/w"),
        "shards verify '{run}/a b'",
    )
    errors_found: list[UserError] = []
    words = [link.words for link in read_chain(given, run, errors_found)]
    assert not errors_found and words == [
        ("evaluate", str(run)),
        ("evaluate", str(run), "--split", "valid"),
        ("evaluate", str(run), "--json"),
        ("report", str(run)),
        ("doctor",),
        ("convert", str(run), str(run / "huggingface"), "--to", "huggingface"),
        ("convert", str(run), "out", "--to", "peft"),
        ("convert", "--to", "wavlm", str(run / "checkpoints/best"), str(run / "w")),
        ("shards", "verify", str(run / "a b")),
    ]
    (run / "huggingface").mkdir(parents=True)
    wrong = {
        "evalute": "Did you mean evaluate?",
        "evaluate --spilt valid": "--spilt",
        "evaluate --ranks 0": "--ranks",
        "evaluate 'x": "quot",
        "evaluate --help": "help",
        "convert --to onnx": "onnx",
        "convert": "--to",
        "convert --to huggingface": "exists already",
        "shards": "verify",
        "shards verfy": "Did you mean verify?",
        "": "names no command",
    }
    assert read_chain(list(wrong), run, errors_found) == []
    for error, (text, part) in zip(errors_found, wrong.items(), strict=True):
        assert repr(text) in error.where and part in f"{error}", str(error)


def test_share_of_memory() -> None:
    assert [share_of(*given) for given in ((None, 4), ("0", 4), ("200G", 8), ("1000", 3), ("64GB", 2))] == [
        *(None, "0", f"{25 * 1024**2}K", "341334K", f"{32 * 1024**2}K"),
    ]


@pytest.mark.slow
def test_local_chain(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands follow one after another; after one that fails, none. The exit code tells."""
    run = tmp_path / "run"
    local = ("submit", recipe, "--output", run, "--cluster", "local", "--gpus-per-node", "0")
    assert call(*local, "--then", "evaluate --split dev", "--then", "evalute") == 2
    told = errors(capsys.readouterr().err)
    assert len(told) == 2 and "Did you mean evaluate?" in told[0] and "no split 'dev'" in told[1] and not run.exists()

    chain = ("evaluate --split train", "shards verify {run}/nothing", "report")
    assert call(*local, *(word for text in chain for word in ("--then", text)), "--wait") == 1
    assert (run / "predictions_train.csv").is_file()
    found = gather([Files(run)])[0]
    assert [(link.command.split()[1], link.state) for link in found.chain] == [
        ("evaluate", "COMPLETED"), ("shards", "FAILED"), ("report", "CANCELLED")
    ]  # fmt: skip


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_chain_on_slurm(
    recipe: Path, idle_cluster: LabCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, evaluate, convert are three jobs; where the training fails, what follows is cancelled by Slurm."""
    launch = ("--no-preflight", "--cpus-per-rank", "1", "--time", "20:00", "--memory", "1000")
    then = ("--then", "evaluate --split valid", "--then", "convert --to huggingface")
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert call("submit", recipe, MISSING, "--output", bad, *launch, *then) == 0
    assert call("submit", recipe, "--output", good, *launch, *then, "--wait") == 0
    (submission,) = LaunchRecord(good).read_submissions()
    jobs = [submission.job, *(link.job for link in submission.chain)]
    shown = [idle_cluster.slurm("scontrol", "show", "job", job) for job in jobs]
    assert ["gpu" in text.partition("TresPerNode=")[2].partition("\n")[0] for text in shown] == [True, True, False]
    assert all("KillOInInvalidDependent=Yes" in text for text in shown[1:])
    assert (good / "predictions_valid.csv").is_file()
    config = json.loads((good / "huggingface/config.json").read_text())
    assert config["model_type"] == "llama"
    assert "completed" in capsys.readouterr().out

    (failed,) = LaunchRecord(bad).read_submissions()
    following = [link.job for link in failed.chain]
    deadline = time.monotonic() + 60
    while {state.state for state in job_states(following).values()} != {"CANCELLED"}:
        assert time.monotonic() < deadline, job_states(following)
        time.sleep(0.5)
    assert not (bad / "predictions_valid.csv").exists() and not (bad / "huggingface").exists()
    assert {link.state for link in gather([Files(bad)])[0].chain} == {"CANCELLED"}
