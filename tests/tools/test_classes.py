"""Shards whose labels are classes: made from a manifest, looked at, verified, and mixed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import UserError
from sharding.mix import Part, mix_info
from sharding.shards import load_info
from sharding.stream import ShardedSplit
from tests.end_to_end.commands import call, errors

NAMES = ["calm", "angry voice", "sad"]


def make(folder: Path, labels: list[str], classes: list[str]) -> int:
    """Shards in OUT of a clip for each label, all in the training split; exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "audio.npy", np.random.default_rng().normal(size=(4, 3)).astype(np.float32))
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["key", "audio", "label", "split"])
        table.writerows([f"clip{i:02d}", "audio.npy", label, "train"] for i, label in enumerate(labels))
    words = ("shards", "make", folder / "clips.csv", folder / "out", "--workers", "1", "--classes", ",".join(classes))
    return call(*words)


def test_classes_by_name_and_by_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [0, *np.random.default_rng().integers(0, 3, 11).tolist()]
    told = [str(place) if i % 2 else NAMES[place] for i, place in enumerate(places)]
    assert make(tmp_path, told, NAMES) == 0
    assert ShardedSplit(tmp_path / "out", "train").labels.tolist() == places
    assert load_info(tmp_path / "out").classes == NAMES
    capsys.readouterr()
    assert call("shards", "inspect", tmp_path / "out") == 0
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert all([*name.split(), str(places.count(place))] in shown for place, name in enumerate(NAMES))
    assert any(line[:3] == ["train", "clip00", "calm"] for line in shown)


def test_every_label_that_is_no_class_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path, ["calm", "Calm", "3", "-1", "0.5", "sad"], NAMES) == 2
    found = errors(capsys.readouterr().err)
    assert [line.split(":")[1].split()[0] for line in found] == ["3", "4", "5", "6"]  # lines of the manifest
    assert all("is no class" in line and "calm, angry voice, sad" in line for line in found)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "1e3", "calm", "[bold]x[/bold]", "a:b", "a$b", "x" * 41, "a\nb"])
def test_names_that_could_not_be_shown_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path, ["0"], ["calm", name]) == 2
    (found,) = errors(capsys.readouterr().err)
    assert found.startswith("--classes: names")


def test_verify_finds_a_label_that_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path, ["calm", "sad"], NAMES) == 0
    out = tmp_path / "out"
    info = json.loads((out / "dataset.json").read_text())
    info["classes"] = NAMES[:2]
    (out / "dataset.json").write_text(json.dumps(info))
    capsys.readouterr()
    assert call("shards", "verify", out) == 2
    (found,) = errors(capsys.readouterr().err)
    assert "clip01" in found and "has the label 2, which is no class" in found
    assert call("shards", "inspect", out) == 0


def test_only_equal_classes_are_mixed(tmp_path: Path) -> None:
    for name, classes in {"a": NAMES, "b": NAMES, "c": NAMES[::-1]}.items():
        assert make(tmp_path / name, ["calm", "sad"], classes) == 0
    parts = [Part(name, tmp_path / name / "out", 1.0) for name in "abc"]
    assert mix_info(parts[:2]).classes == NAMES
    with pytest.raises(UserError, match="has classes sad, angry voice, calm"):
        mix_info(parts)
