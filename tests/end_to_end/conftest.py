from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.recipe import write_recipe
from tests import tiny
from tests.end_to_end.commands import REFUSED, Refused, call, errors, run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command in this process; returns its error lines."""

    def refuse(*words: str | Path) -> list[str]:
        code = call(*words)
        printed = capsys.readouterr().err
        assert code == REFUSED and "Traceback" not in printed
        return errors(printed) or [" ".join(printed.replace("│", " ").split())]  # options are checked by typer

    return refuse


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 22 training, 6 validation and 6 test clips."""
    return tiny.write_corpus(tmp_path_factory.mktemp("end_to_end") / "shards")


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Path:
    """A recipe of 4 steps on that corpus."""
    write_recipe(tiny.recipe(corpus), corpus.parent / "recipe.yaml")
    return corpus.parent / "recipe.yaml"


@pytest.fixture(scope="session")
def finished(recipe: Path) -> Path:
    """A run of that recipe; copy it before changing it."""
    output = recipe.parent / "finished"
    done = run("train", recipe, "--output", output, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    return output
