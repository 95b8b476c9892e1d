"""`dist-train submit` to a real Slurm: what is refused before anything is queued, and what is queued."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from slurm.record import LaunchRecord
from tests.end_to_end.commands import REFUSED, call, errors, only_error, refusal, run
from tests.slurm.conftest import LabCluster
from tests.slurm.runs import SubmittedRun, write_tiny

pytestmark = pytest.mark.slurm
TINY = ("--gpus-per-node", "1", "--cpus-per-rank", "1", "--time", "5:00")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("submit"), epochs=1)


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The error lines of a submission that is refused in this process."""
    assert call("submit", *words) == REFUSED
    return "\n".join(errors(capsys.readouterr().err))


def test_all_that_the_partition_lacks_is_told_at_once(
    recipe: Path, idle_cluster: LabCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    asked = ("--nodes", "3-5", "--gpus-per-node", "3", "--cpus-per-rank", "4", "--time", "3:00:00")
    told = refused(capsys, recipe, "--output", output, *asked)
    for part in (
        "--nodes: 3-5 asked for, main has 2. Give 2 or fewer.",
        "--gpus-per-node: 3 asked for, nodes of main have 2. Give --gpus-per-node 2 or less.",
        "--cpus-per-rank: 3 ranks × 4 cores asked for, nodes of main have 8. Give 2 or less.",
        "--time: 3:00:00 is over the limit of main, 2:00:00.",
    ):
        assert part in told
    assert not output.exists() and not idle_cluster.jobs()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--partition", "gpuu"), r"--partition: gpuu is unknown to this cluster\. Known: main, high"),
        (("--reservation", "mine"), r"sbatch: .*reservation.*Give a --reservation that"),
        (("--constraint", "h100"), r"sbatch: .*--constraint"),
        (("--nodes", "2-1"), r"--nodes: is '2-1': write a number of nodes"),
        (("--time", "soon"), r"--time: is 'soon': write minutes"),
        (("--time", "2:00"), r"--time: 2:00 leaves nothing beside the 180 s for saving"),
        (("data.batch=2", "--nodes", "2", "--gpus-per-node", "2"), r"data\.batch: 2 clips cannot feed 4 ranks"),
        (("data.bach=1",), r"data\.bach"),
        (("--cluster", "pbs"), r"--cluster: is 'pbs'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_refused(
    recipe: Path,
    idle_cluster: LabCluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    output = tmp_path / "runs" / "run"
    assert re.search(told, refused(capsys, recipe, "--output", output, *TINY, *words))
    assert not output.parent.exists() and not idle_cluster.jobs()


def test_places_that_nodes_do_not_share(recipe: Path, cluster: LabCluster, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path("/dev/shm") / f"dist-train-test-{os.getpid()}"
    assert "lies in this machine's memory (tmpfs)" in refused(capsys, recipe, "--output", place, *TINY)
    assert not place.exists()


def test_no_slurm(recipe: Path, tmp_path: Path) -> None:
    told = refusal("submit", recipe, "--output", tmp_path / "run", *TINY, PATH="/nowhere")
    assert (
        told == "Slurm: its commands are not on PATH. Run this on a login node of the cluster, or give --cluster local."
    )


def test_accounting_off(recipe: Path, cluster_without_accounting: LabCluster, tmp_path: Path) -> None:
    done = run("submit", recipe, "--output", tmp_path / "run", *TINY)
    assert done.returncode == 0, done.stderr
    assert "Accounting is off (no sacct)" in done.stdout
    cluster_without_accounting.clean()


def test_dry_run(recipe: Path, cluster: LabCluster, tmp_path: Path) -> None:
    """The script on stdout is what a submission then runs, and Slurm takes it."""
    output = tmp_path / "run"
    options = (*TINY, "--nodes", "1-2", "--exclude", "node9", "--exclusive")
    done = run("submit", recipe, "--output", output, *options, "--dry-run")
    assert done.returncode == 0 and not output.exists(), done.stderr
    for line in ("--nodes=1-2", "--gpus-per-node=1", "--time=5:00", "--requeue", "--signal=USR2@180", "--exclusive"):
        assert f"#SBATCH {line}\n" in done.stdout
    script = tmp_path / "job.sh"
    script.write_text(done.stdout.replace("node9", "node1"))
    cluster.slurm("sbatch", "--test-only", str(script))


def test_frozen(recipe: Path, idle_cluster: LabCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options win over the environment's, and the ranks run the code, recipe and settings of the submission."""
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "7:00")
    mine = tmp_path / "recipe.yaml"
    shutil.copy(recipe, mine)
    submitted = SubmittedRun(mine, tmp_path / "run", nodes="1", setup=["sleep 2"])
    shown = idle_cluster.slurm("scontrol", "show", "job", submitted.job)
    assert "Requeue=1" in shown and "TimeLimit=00:20:00" in shown
    mine.write_text("no: recipe")
    code = LaunchRecord(tmp_path / "run").code
    (code / "slurm" / "marked.py").write_text("")
    job = code / "slurm" / "job.py"
    job.write_text(job.read_text() + "\nprint('this is the frozen code', file=sys.stderr)\n")
    assert submitted.wait_end().decision == "done", submitted.printed()
    assert "this is the frozen code" in submitted.printed()
    script = (tmp_path / "run" / "slurm" / "job.sh").read_text()
    assert shlex.quote(sys.executable) in script and "--kill-on-bad-exit=1" in script
    # Submitted again, it has nothing of the old results (job ids may begin anew).
    again = LaunchRecord(tmp_path / "run").new_folder()
    assert again.name == "2" and not any(again.iterdir())


def test_node_that_is_down(recipe: Path, idle_cluster: LabCluster, tmp_path: Path) -> None:
    """It is told at submission; the job waits, and runs when the node is back."""
    idle_cluster.slurm("scontrol", "update", "nodename=node2", "state=drain", "reason=broken fan")
    done = run("submit", recipe, "--output", tmp_path / "run", *TINY, "--nodes", "2", "--no-preflight")
    assert done.returncode == 0, done.stderr
    assert "Only 1 of 2 nodes of main are up" in done.stdout
    job = LaunchRecord(tmp_path / "run").read_submissions()[0].job
    assert idle_cluster.slurm("squeue", "-hj", job, "-o", "%T").strip() == "PENDING"
    idle_cluster.slurm("scontrol", "update", "nodename=node2", "state=resume")
    idle_cluster.slurm("scancel", job)


def test_second_submission_is_refused(
    recipe: Path, idle_cluster: LabCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs in one run directory would write over each other."""
    first = SubmittedRun(recipe, tmp_path / "run", setup=["sleep 60"])
    told = refused(capsys, recipe, "--output", first.output, *TINY, "--resume")
    assert f"is at work already (job {first.job} is" in told
    assert only_error(call("submit", recipe, "--output", first.output, *TINY), capsys.readouterr().err)
    idle_cluster.slurm("scancel", first.job)
