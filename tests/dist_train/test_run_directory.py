from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.run_directory import RunDirectory
from sharding.errors import UserError


def test_a_restart_keeps_nothing_of_a_try_that_saved_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log({"kind": "step", "step": 1})
    run.plan.write_text("{}")
    assert not run.saved
    run.restart()
    run.restart()  # nor does it need anything to be there
    assert run.metrics.read_text() == "" and not run.plan.exists()


def test_a_checkpoint_counts_as_saved_even_if_its_pointers_are_gone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    assert not run.saved
    (run.checkpoints / "step_00000003").mkdir()
    assert run.saved


def test_what_was_written_before_a_run_does_not_make_it_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    RunDirectory(tmp_path).create()
    (tmp_path / "other").touch()
    with pytest.raises(UserError, match="exists already"):
        RunDirectory(tmp_path).create()
