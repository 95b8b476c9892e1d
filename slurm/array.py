"""Several runs as one Slurm job array: each element trains in a run directory of its own, as a job of its own would."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from slurm.ask import ask
from slurm.executor import ours_win, refused, script_of, slurm_executor, test_only
from slurm.job import TrainingJob
from slurm.record import LaunchRecord
from slurm.settings import LaunchSettings

USUAL_MOST = 1001  # elements, where the cluster does not tell: Slurm's default of MaxArraySize


@dataclass(frozen=True)
class Array:
    """Runs that ask for the same.

    Args:
        folder: made for this array. Its file `runs` names the run directory of each element, a line each; `0`, `1`, …
            are links to where each run keeps the logs of this job, since an array has one pattern for them all.
        code: the packages, as submitted.
        runs: run directories, absolute, with launch.json written.
        parallel: how many may run at once.
    """

    folder: Path
    code: Path
    runs: Sequence[Path]
    settings: LaunchSettings
    name: str
    parallel: int | None = None

    def executor(self) -> SlurmExecutor:
        """Submitit's executor. A single run is no array: its logs go straight to its directory."""
        if len(self.runs) == 1:
            run = self.runs[0]
            return slurm_executor(self.code, shlex.quote(str(run)), self.settings, self.folder / "0", self.name)
        executor = slurm_executor(self.code, '"$run"', self.settings, self.folder, self.name)
        asked, table = executor.parameters, shlex.quote(str(self.folder / "runs"))
        batch, ranks = (f"{self.folder}/%a/%A_%a_{task}_log" for task in ("0", "%t"))
        executor.update_parameters(
            setup=[f'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {table})', *asked["setup"]],
            additional_parameters={
                **asked["additional_parameters"],
                "output": f"{batch}.out",
                "error": f"{batch}.err",
            },
            srun_args=[*asked["srun_args"], f"--output={ranks}.out", f"--error={ranks}.err"],  # these go before others
            array_parallelism=min(self.parallel or len(self.runs), len(self.runs)),
        )
        return executor

    def script(self) -> str:
        """The batch script."""
        executor = self.executor()
        if len(self.runs) > 1:
            executor.parameters["map_count"] = len(self.runs)  # as Submitit does when it submits
        return script_of(executor)

    def prepare(self) -> str:
        """Fills the folder, and asks Slurm whether it would take the array. Returns its answer.

        Raises:
            UserError: it would not.
        """
        self.folder.mkdir(parents=True)
        (self.folder / "runs").write_text("".join(f"{run}\n" for run in self.runs))
        for number, run in enumerate(self.runs):
            (self.folder / str(number)).symlink_to(os.path.relpath(LaunchRecord(run).new_folder(), self.folder))
        script = self.folder / "job.sh"
        script.write_text(self.script())
        ours_win(self.settings)
        return test_only(script)

    def submit(self) -> list[str]:
        """Queues it. Returns the job id of each run: ID_ELEMENT.

        Raises:
            UserError: Slurm refuses it.
        """
        executor = self.executor()
        try:
            with executor.batch():
                jobs = [executor.submit(TrainingJob(str(run))) for run in self.runs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise refused(" ".join(str(error).split())) from None
        return [job.job_id for job in jobs]


def most_elements() -> int:
    """How many elements an array of this cluster may have."""
    found, text = ask(["scontrol", "show", "config"], 20.0)
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE) if found else None
    return int(match[1]) if match else USUAL_MOST
