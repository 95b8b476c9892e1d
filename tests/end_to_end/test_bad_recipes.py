"""Bad recipes, run directories and environments: what is refused before any rank starts."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dist_train import cli
from tests import tiny
from tests.corpus import forbidden_directory, read_only
from tests.end_to_end.commands import INTERRUPTED, Refused, press_ctrl_c, refusal, started, wait_until

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes/quickstart.yaml"


@pytest.fixture
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if a rank is started."""
    monkeypatch.setattr("sharding.launch.start_rank", lambda *_: pytest.fail("a rank was started"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["training.epoch=3", "optimiser.name=x"], ["training.epochs?", "optimiser: is not a key"]),
        (["training.epochs=1.5", "data.batch=1"], ["training.epochs", "data.batch"]),
        (["data.on_bad_sample=skip"], ["data.on_bad_sample"]),
        (["seed"], ["seed"]),
        (["=3"], ["=3"]),
        (["seed=[1"], ["seed=[1"]),
        (["seed.x=3"], ["seed"]),
        (["data.path=${nope}"], ["nope"]),
        (["text.config.hidden_size=63"], ["text.config"]),
    ],
)
def test_overrides(words: list[str], expected: list[str], refused: Refused) -> None:
    found = sorted(refused("recipe", QUICKSTART, *words))
    assert len(found) == len(expected)
    assert all(any(want in line for line in found) for want in expected)


@pytest.mark.parametrize(
    "content", [b"{a: [1,", b"- 1\n- 2\n", b"seed: \xff\xfe", b"seed: 1\nseed: 2\n", b"a: &a [*a]\n"]
)
def test_files_that_are_no_recipe(content: bytes, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    (line,) = refused("recipe", tmp_path / "r.yaml")
    assert "r.yaml" in line


def test_recipes_that_are_not_there(tmp_path: Path, refused: Refused, no_rank: None) -> None:
    for path in (tmp_path / "gone.yaml", tmp_path):
        for words in (["recipe", path], ["train", path, "--output", tmp_path / "new/run", "--ranks", "2"]):
            (line,) = refused(*words)
            assert str(path) in line and "cannot be read" in line
    assert not list(tmp_path.iterdir())


def test_not_a_run(tmp_path: Path, recipe: Path, refused: Refused, no_rank: None) -> None:
    for path in (tmp_path, tmp_path / "gone", recipe):
        assert "is not a run directory" in refused("evaluate", path)[0]
        assert str(path) in refused("report", path)[0]
        assert "is not a run directory" in refused("train", recipe, "--output", path, "--resume")[0]


def test_no_ranks(recipe: Path, tmp_path: Path, refused: Refused) -> None:
    assert "--ranks" in refused("train", recipe, "--output", tmp_path / "run", "--ranks", "0")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK"),
    ],
)
def test_environments_no_launcher_makes(variables: dict[str, str], named: str, recipe: Path, tmp_path: Path) -> None:
    assert named in refusal("train", recipe, "--output", tmp_path / "run", limit=30, **variables)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_too_many_ranks_are_refused_before_they_start(
    resume: list[str], recipe: Path, tmp_path: Path, refused: Refused, no_rank: None
) -> None:
    few = tiny.write_corpus(tmp_path / "few", train=1, valid=2, test=2)
    cases: list[tuple[list[str], int, str]] = [
        ([], 30, "has 22 training clips for 30 ranks. Use at most 22 ranks."),
        ([f"data.path={few}"], 2, "has 1 training clips for 2 ranks"),
        ([], 7, "data.batch: 6 clips cannot feed 7 ranks × 1 micro-steps. Write at least 7."),
        (["training.accumulation=3"], 3, "data.batch: 6 clips cannot feed 3 ranks × 3 micro-steps"),
    ]
    for changes, number, expected in cases:
        (line,) = refused("train", recipe, *changes, "--output", tmp_path / "run", "--ranks", number, *resume)
        assert expected in line
    assert not (tmp_path / "run").exists()


def test_runs_where_nothing_can_be_written(tmp_path: Path, recipe: Path, corpus: Path, refused: Refused) -> None:
    assert "shards: exists already" in refused("train", recipe, "--output", corpus)[0]
    assert "Not a directory" in refused("train", recipe, "--output", recipe / "out")[0]
    with forbidden_directory(tmp_path / "forbidden") as forbidden:
        assert "cannot be made" in refused("train", recipe, "--output", forbidden / "run")[0]
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.read_text())
    with read_only(run):
        (line,) = refused("report", run)
    assert line.startswith(f"{run}: the report cannot be written (")


def test_names_no_disk_takes(recipe: Path, tmp_path: Path, refused: Refused, no_rank: None) -> None:
    long = tmp_path / ("x" * 300)
    for words in (["train", recipe, "--output", long], ["train", long, "--output", tmp_path / "run"], ["report", long],
                  ["evaluate", long], ["recipe", long], ["shards", "inspect", long], ["shards", "verify", long],
                  ["shards", "make", long, tmp_path / "out"], ["shards", "demo", long]):  # fmt: skip
        (line,) = refused(*words)
        assert line.startswith(str(long)) and "File name too long" in line


@pytest.mark.parametrize("number", ["EACCES", "EDQUOT", "EIO", "ENOSPC", "EPERM", "EROFS", "ESTALE"])
def test_what_a_disk_refuses_is_told_in_one_line(
    number: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = getattr(errno, number)

    def refuse(run: Path) -> None:
        raise OSError(code, os.strerror(code), str(run / "report.html"))

    monkeypatch.setattr("dist_train.report.write_report", refuse)
    (line,) = refused("report", tmp_path)
    assert line.startswith(f"{tmp_path}/report.html: {os.strerror(code)}. Free space")


def test_ctrl_c_before_a_command_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in INTERRUPTED


def test_ctrl_c_in_report(tmp_path: Path) -> None:
    terms = {f"loss/{name}": 1.0 for name in ("mse_complete", "rs", "rnc")}
    steps = [{"kind": "step", "step": step, "loss": 3.0, **terms, "step_seconds": 1.0} for step in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    with started("report", tmp_path) as process:
        wait_until(lambda: list(tmp_path.glob("figures/*.png")), process)
        press_ctrl_c(process)
    assert not (tmp_path / "report.html").exists()
