"""Which checkpoints stay, and which one a run goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import portable, retention
from sharding.errors import UserErrors


def write(root: Path, step: int, best: int | None = None) -> Path:
    directory = retention.step_directory(root, step)
    state = {"pointers": {} if best is None else {"best": best}}
    portable.write(directory, [("weight", torch.zeros(3))], [], state)
    return directory


def names(root: Path) -> list[int]:
    return sorted(retention.completed(root))


@given(
    steps=st.sets(st.integers(1, 60), min_size=1),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(2, 9),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_what_stays(
    steps: set[int],
    keep_last: int,
    keep_every: int | None,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("root")
    for step in steps:
        retention.step_directory(root, step).mkdir()
    best = data.draw(st.sampled_from(sorted(steps)))
    retention.point(root, {"best": best, "last": max(steps)})
    retention.prune(root, keep_last, keep_every)
    expected = {best, *sorted(steps)[-keep_last:]} | {step for step in steps if keep_every and step % keep_every == 0}
    assert names(root) == sorted(expected)
    assert (root / "best").resolve().name == f"step_{best:08d}"


def test_a_pointer_moves(tmp_path: Path) -> None:
    for step in (2, 3):
        write(tmp_path, step)
        retention.point(tmp_path, {"best": step})
        assert (tmp_path / "best").resolve() == retention.step_directory(tmp_path, step)


@pytest.mark.parametrize(
    ("damaged", "expected", "lost"),
    [
        ([], 50, []),
        ([50], 40, []),
        ([40, 50], 30, []),
        ([20], 10, []),  # the best of 30, 40 and 50: from 10 it comes again
        ([10, 20], 50, ["best"]),  # no older one would bring it back
        ([10, 20, 50], 40, ["best"]),
        ([10, 20, 30, 40, 50], None, []),
    ],
)
def test_the_newest_whole_one_is_found(
    damaged: list[int], expected: int | None, lost: list[str], tmp_path: Path
) -> None:
    """Saved at 10 … 50, the best at 20; damaged are files, a manifest, or all is gone."""
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step, best=min(step, 20))
    retention.point(tmp_path, {"last": 50, "best": 20})
    for number, step in enumerate(damaged):
        directory = retention.step_directory(tmp_path, step)
        name = [portable.MANIFEST, portable.STATE, portable.part_name("model", 1, 1)][number % 3]
        (directory / name).write_bytes(b"{")
    if expected is None:
        with pytest.raises(UserErrors) as caught:
            retention.newest_whole(tmp_path)
        assert len(caught.value.errors) == 5
        return
    newest = retention.newest_whole(tmp_path)
    assert newest.checkpoint.directory == retention.step_directory(tmp_path, expected) and newest.lost == lost
    assert len(newest.errors) == sum(step > expected for step in damaged)
    (tmp_path / "step_00000051.writing").mkdir()
    retention.set_back(tmp_path, newest)
    assert (tmp_path / "last").resolve() == newest.checkpoint.directory
    assert names(tmp_path) == [step for step in (10, 20, 30, 40, 50) if step <= expected]
    assert {path.name for path in tmp_path.glob("*.aside")} == {
        f"step_{step:08d}.aside" for step in (10, 20, 30, 40, 50) if step > expected
    }
    assert not list(tmp_path.glob("*.writing"))
    if lost:
        assert not (tmp_path / "best").exists()
    else:
        assert (tmp_path / "best").resolve() == retention.step_directory(tmp_path, min(expected, 20))


def test_vanished_ones_are_not_missed(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step, best=1)
    shutil.rmtree(retention.step_directory(tmp_path, 2))
    assert retention.newest_whole(tmp_path).checkpoint.directory == retention.step_directory(tmp_path, 1)
    with pytest.raises(UserErrors, match="holds no checkpoint"):
        retention.newest_whole(tmp_path / "nothing")
