"""Hostile input ends in a clear refusal: within bounds of time and memory, and with nothing written elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.security import hostile_checkpoints, hostile_manifests, hostile_recipes, hostile_shards
from tests.security.attempt import CANARY, attempt, snapshot
from tests.security.case import Case

TABLES = {
    "shards": hostile_shards,
    "manifests": hostile_manifests,
    "recipes": hostile_recipes,
    "checkpoints": hostile_checkpoints,
}
CASES = [pytest.param(case, id=f"{of}: {case.name}") for of, table in TABLES.items() for case in table.CASES]
LONGEST_LINE = 1600  # three parts of a message


@pytest.mark.parametrize("case", CASES)
def test_hostile_input(case: Case, tmp_path: Path) -> None:
    folder, scratch = tmp_path / "work", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    what = case.make(folder)
    (folder / "canary").write_text(CANARY)
    before = snapshot(folder)
    done = attempt(what, folder, scratch)
    printed = done.out + done.err
    assert done.code == 2, (done.code, printed[-3000:])
    assert "Traceback" not in printed and CANARY not in printed
    assert len(done.errors) == len(case.says), done.errors
    for line, says in zip(done.errors, case.says, strict=True):
        assert re.search(says, line) and line.isprintable() and len(line) <= LONGEST_LINE, line[:3000]
    assert snapshot(folder) == before


def test_the_table_is_long_and_names_each_case_once() -> None:
    names = [case.id for case in CASES]
    assert len(names) == len(set(names)) >= 40
