"""What no rule refuses is trained, what a rule refuses fails as it says, and the page tells the same."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from sharding.errors import UserErrors
from sharding.rules import RULES, Case, all_cases, domains, incompatible, works
from tests import tiny
from tests.ranks import run_ranks
from tools.compatibility import PAGE, page

CELL = ("tuning", "quantisation", "stage")  # the table of the page
FAILS = {  # how what is refused shows, where it raises
    "quantised weights cannot be trained": r"only Tensors of floating point dtype can require gradients",
    "DoRA on int8": r"'NoneType' object has no attribute|'Int8Params' object has no attribute",
    "DoRA on nf4 in shards": r"'Params4bit' object has no attribute 'ds_status'",
}
NO_ERROR = {  # the others: outside the recipe, seen in test_parameter_table, or without any effect
    "fp16",
    "int8 in shards",
    "optimizer offload without shards",
    "parameter offload without sharded parameters",
}

Settings = tuple[tuple[str, Any], ...]


def pairs(case: Case) -> set[Settings]:
    """Every two settings of a case, and its cell of the table."""
    values = asdict(case)
    return {*combinations(values.items(), 2), tuple((name, values[name]) for name in CELL)}


def covering(cases: Iterable[Case]) -> list[Case]:
    """Some of the cases that together have every cell, and every two settings, of all of them (greedily)."""
    left = {case: pairs(case) for case in cases}
    wanted = set().union(*left.values())
    chosen = []
    while wanted:
        best = max(left, key=lambda case: len(left[case] & wanted))
        chosen.append(best)
        wanted -= left[best]
    return chosen


WORKING = [case for case in all_cases() if works(case)]
CHOSEN = covering(WORKING)


def test_the_chosen_cases_have_every_two_settings_that_work_together() -> None:
    everywhere: set[Settings] = set().union(*map(pairs, WORKING))
    assert set().union(*map(pairs, CHOSEN)) == everywhere
    cells = {tuple(getattr(case, name) for name in CELL) for case in WORKING}
    assert len(cells) <= len(CHOSEN) < 1.5 * len(cells)


def check(cases: list[Case], folder: Path) -> None:
    """Trains each case: the loss falls, every trainable moves, and at the start precision and stage do not matter."""
    found = run_ranks(
        "cells", 2, folder, module="tests.dist_train.work_rules",
        seed=secrets.randbits(31), cases=[asdict(case) for case in cases],
    )  # fmt: skip
    first: dict[Any, float] = {}
    for case, outcome in zip(cases, found, strict=True):
        assert "error" not in outcome, (case, outcome)
        losses = outcome["losses"]
        assert losses[-1] < losses[0] and outcome["still"] == [], (case, outcome)
        alike = first.setdefault((case.tuning, case.quantisation), losses[0])
        assert losses[0] == pytest.approx(alike, rel=2e-3), (case, outcome)


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_no_rule_refuses_trains(stage: int, half: int, tmp_path: Path) -> None:
    check([case for case in CHOSEN if case.stage == stage][half::2], tmp_path)


def test_the_usual_cases_train(tmp_path: Path) -> None:
    check([Case("lora"), Case("lora", "nf4", optimizer="adamw_8bit"), Case("dora", stage=3), Case("vera")], tmp_path)


def test_what_is_refused_still_fails(tmp_path: Path) -> None:
    """A rule whose reason has gone should go too."""
    refused = [rule for rule in RULES if rule.verdict == "refused"]
    assert {rule.name for rule in refused} == FAILS.keys() | NO_ERROR
    cases, names = [], []
    for rule in refused:
        if rule.name in FAILS:
            for quantisation in rule.when["quantisation"]:
                cases.append(
                    Case(rule.when["tuning"][0], quantisation, max(rule.when.get("stage", (0,))), replicate_int8=True)
                )
                assert rule.matches(cases[-1])
                names.append(rule.name)
    found = run_ranks(
        "cells", 2, tmp_path, module="tests.dist_train.work_rules", seed=1, cases=[asdict(case) for case in cases]
    )
    for name, case, outcome in zip(names, cases, found, strict=True):
        assert re.search(FAILS[name], outcome.get("error", "")), (case, outcome)


def test_the_page_is_up_to_date() -> None:
    """If not: python -m tools.compatibility"""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_a_rule_speaks_of_what_there_is() -> None:
    for rule in RULES:
        assert rule.when.keys() <= domains().keys()
        for name, values in rule.when.items():
            assert set(values) < set(domains()[name])
        assert any(rule.matches(case) for case in all_cases())
        assert rule.problem and rule.remedy and rule.evidence and not rule.remedy.endswith(".")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.verdict == "refused"], ids=lambda rule: rule.name)
@pytest.mark.parametrize("part", ["text", "audio"])
def test_a_recipe_is_refused_at_the_key_of_the_rule(rule: Any, part: str) -> None:
    case = replace(Case("lora"), **{name: values[0] for name, values in rule.when.items()})
    own = {key: getattr(case, key) for key in ("tuning", "quantisation", "activation_checkpointing")}
    around = {key: getattr(case, key) for key in ("stage", "offload_optimizer", "offload_parameters", "replicate_int8")}
    changes: dict[str, Any] = {part: own, "zero": around, "precision": case.precision}
    with pytest.raises(UserErrors) as caught:
        tiny.recipe(Path("none"), **changes)
    (error,) = [error for error in caught.value.errors if error.where == rule.where.format(part=part)]
    assert error.remedy.startswith("Write") and "{" not in str(error)


def test_all_that_is_refused_is_told_once() -> None:
    told = incompatible({"text": Case("dora", "int8", 3, "fp16"), "audio": Case("full", "nf4", 3, "fp16")})
    assert [error.where for error in told] == ["precision", "text.quantisation", "text.quantisation", "audio.tuning"]
    assert incompatible({"text": Case("lora", "int8", 3, replicate_int8=True)}) == []
