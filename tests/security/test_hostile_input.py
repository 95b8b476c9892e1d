"""Hostile input ends in a clear refusal: within bounds of time and memory, and with nothing written elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.security import hostile_checkpoints, hostile_manifests, hostile_recipes, hostile_runs, hostile_shards
from tests.security.attempt import CANARY, attempt, snapshot
from tests.security.case import Case

TABLES = {
    "shards": hostile_shards,
    "manifests": hostile_manifests,
    "recipes": hostile_recipes,
    "checkpoints": hostile_checkpoints,
    "runs": hostile_runs,
}
CASES = [pytest.param(case, id=f"{of}: {case.name}") for of, table in TABLES.items() for case in table.CASES]
REPORT = ("run/report.html", "run/figures")  # what `report` may write
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
    assert done.code == (0 if case.page else 2), (done.code, printed[-3000:])
    assert "Traceback" not in printed and CANARY not in printed
    assert len(done.errors) == len(case.says), done.errors
    for line, says in zip(done.errors, case.says, strict=True):
        assert re.search(says, line) and line.isprintable() and len(line) <= LONGEST_LINE, line[:3000]
    after = snapshot(folder)
    if case.page:
        page = (folder / "run/report.html").read_text()
        assert all(re.search(says, page) for says in case.page), page[:3000]
        assert not re.search(r"<script|<[^>]* onload=", page)
        after = {name: entry for name, entry in after.items() if not name.startswith(REPORT)}
        after["run"] = before["run"]
    assert after == before


def test_the_table_is_long_and_names_each_case_once() -> None:
    names = [case.id for case in CASES]
    assert len(names) == len(set(names)) >= 40
