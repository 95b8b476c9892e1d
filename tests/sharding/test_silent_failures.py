"""What goes wrong in DeepSpeed without a word, each reproduced in its bare engine and shown to be stopped by name.

Two real ranks over gloo; what is right is a float64 loop over both ranks' inputs.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks

WRONG = [
    ("other branches", 1),
    ("other branches", 2),
    ("swapped passes", 2),
    ("other gradients", 1),
    ("other gradients", 2),
    ("unused later", 3),
    ("unused in a first micro-step", 3),
]
RIGHT = [
    *(("agreeing", stage) for stage in (0, 1, 2, 3)),
    ("other branches", 0),
    ("swapped passes", 0),
    ("swapped passes", 1),
    *(("unused later", stage) for stage in (0, 1, 2)),
    *(("unused in a first micro-step", stage) for stage in (0, 1, 2)),
]
STOPPED = {
    "other branches": (0, "step 1: the ranks run different modules: after 1 that are the same, "
                       "rank 0 runs b, rank 1 runs c."),
    "swapped passes": (0, "step 1: the ranks run different modules: after 0 that are the same, "
                       "rank 0 runs stem, rank 1 runs b."),
    "skipped branch": (0, "step 1: the ranks run different modules: after 1 that are the same, "
                       "rank 0 runs b, rank 1 runs head."),
    "other gradients": (0, "step 1: b.weight (and 3 more) got no gradient on rank 1."),
    "unused later": (1, "step 2: b.weight (and 1 more) got no gradient on ranks 0-1."),
    "unused in a first micro-step": (1, "step 2: b.weight (and 1 more) got no gradient on ranks 0-1."),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checked = [*WRONG, ("agreeing", 2), ("agreeing", 3), *(("skipped branch", stage) for stage in (0, 1, 2))]
    arguments: dict[str, Any] = {"seed": secrets.randbits(31), "bare": [*WRONG, *RIGHT], "checked": checked}
    folder = tmp_path_factory.mktemp("trained")
    return run_ranks("trained", 2, folder, module="tests.sharding.work_silent_failures", **arguments)


def moves(run: dict[str, Any], step: int, layer: str) -> np.ndarray:
    """How far weight and bias of a layer moved in a step, flat."""
    return np.concatenate([np.ravel(run["moved"][step][f"{layer}.{part}"]) for part in ("weight", "bias")])


def gradient(right: dict[str, Any], step: int, rank: int, layer: str) -> np.ndarray:
    """A rank's own gradient of a layer, flat, in the float64 loop."""
    return np.concatenate([np.ravel(right["gradients"][step][rank][f"{layer}.{part}"]) for part in ("weight", "bias")])


def due(right: dict[str, Any], step: int, layer: str) -> np.ndarray:
    """How far SGD on the mean gradient of both ranks moves a layer."""
    return -right["rate"] * (gradient(right, step, 0, layer) + gradient(right, step, 1, layer)) / 2


def error(value: np.ndarray, expected: np.ndarray) -> float:
    """Length of the difference against that of the longer one."""
    return float(np.linalg.norm(value - expected) / np.max([*map(np.linalg.norm, (value, expected)), 1e-30]))


@pytest.mark.parametrize(("name", "stage"), RIGHT)
def test_where_deepspeed_is_right(name: str, stage: int, runs: dict[str, Any]) -> None:
    """So that the engine, the inputs and the reference of the other tests are known to fit together."""
    run, right = runs["bare"][f"{name}, {stage}"], runs["reference"][name]
    np.testing.assert_allclose(run["losses"], right["losses"], rtol=1e-4)
    for step in range(len(right["losses"])):
        for layer in ("stem", "b", "c", "head"):
            assert error(moves(run, step, layer), due(right, step, layer)) < 1e-3


@pytest.mark.parametrize(("name", "stage"), WRONG)
def test_the_bare_engine_trains_on_without_a_word_and_wrongly(name: str, stage: int, runs: dict[str, Any]) -> None:
    run, right = runs["bare"][f"{name}, {stage}"], runs["reference"][name]
    assert run["messages"] == [None, None] and len(run["losses"]) == len(right["losses"])
    assert np.isfinite(run["losses"]).all()
    np.testing.assert_allclose(run["losses"][0], right["losses"][0], rtol=1e-5)
    assert max(error(moves(run, step, "b"), due(right, step, "b")) for step in range(len(right["losses"]))) > 0.1


@pytest.mark.parametrize("name", ["other branches", "other gradients"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_two_branches_are_added_to_each_other(name: str, stage: int, runs: dict[str, Any]) -> None:
    """Rank 0 has a gradient of b, rank 1 one of c: ZeRO-1 and -2 give both layers the mean of the two."""
    run, right = runs["bare"][f"{name}, {stage}"], runs["reference"][name]
    mixed = -right["rate"] * (gradient(right, 0, 0, "b") + gradient(right, 0, 1, "c")) / 2
    for layer in ("b", "c"):
        assert error(moves(run, 0, layer), mixed) < 1e-3
        assert error(moves(run, 0, layer), due(right, 0, layer)) > 0.1


def test_swapped_passes_give_other_losses(runs: dict[str, Any]) -> None:
    """The order in which gradients become whole differs by rank, so ZeRO-2's buckets do not fit together."""
    run, right = runs["bare"]["swapped passes, 2"], runs["reference"]["swapped passes"]
    assert all(error(moves(run, 0, layer), due(right, 0, layer)) > 0.1 for layer in ("stem", "b", "head"))
    assert np.abs(np.array(run["losses"][2]) / np.array(right["losses"][2]) - 1).max() > 1e-3


def test_an_old_gradient_is_applied_again(runs: dict[str, Any]) -> None:
    """ZeRO-3 moves an unused layer by exactly what it moved when it was used last."""
    run, right = runs["bare"]["unused later, 3"], runs["reference"]["unused later"]
    assert not due(right, 1, "b").any() and not due(right, 2, "b").any()
    for step in (1, 2):
        assert error(moves(run, step, "b"), moves(run, 0, "b")) < 1e-3
    run, right = runs["bare"]["unused in a first micro-step, 3"], runs["reference"]["unused in a first micro-step"]
    assert error(moves(run, 1, "b"), due(right, 1, "b") + moves(run, 0, "b")) < 1e-3


@pytest.mark.parametrize(("name", "stage"), [*WRONG, *(("skipped branch", stage) for stage in (0, 1, 2))])
def test_the_checks_stop_every_rank_by_name_before_the_weights_change(
    name: str, stage: int, runs: dict[str, Any]
) -> None:
    """Also a branch that only one rank runs, which would crash or hang in backward."""
    run, (finished, message) = runs["checked"][f"{name}, {stage}"], STOPPED[name]
    assert all(said.startswith(message) for said in run["messages"]), run["messages"]
    assert len(run["losses"]) == finished and not run["changed"]
    assert run["hooks"][0] == run["hooks"][1]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_checks_change_nothing_where_ranks_agree(stage: int, runs: dict[str, Any]) -> None:
    assert runs["checked"][f"agreeing, {stage}"] == runs["bare"][f"agreeing, {stage}"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments: dict[str, Any] = {"seed": secrets.randbits(31), "stages": [2, 3]}
    folder = tmp_path_factory.mktemp("bases")
    return run_ranks("bases", 2, folder, module="tests.sharding.work_silent_failures", **arguments)


@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("kind", ["full", "trainables", "universal"])
def test_deepspeed_loads_a_checkpoint_onto_another_frozen_base(kind: str, stage: str, loaded: dict[str, Any]) -> None:
    """It restores the base from full checkpoints only; with the others it trains on upon whatever base is there,
    without a word of it.
    """
    found = loaded[stage]
    for base in ("same", "other"):
        run = found[f"{kind}, {base}"]
        assert run["path"] is not None
        assert not any(word in line for lines in run["lines"] for line in lines for word in ("frozen", "base."))
        if base == "same" or kind == "full":
            np.testing.assert_allclose(run["losses"], found["continued"], rtol=1e-5)
        else:
            assert not np.allclose(run["losses"], found["continued"], rtol=1e-2)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_our_checkpoint_is_refused_on_another_frozen_base(stage: str, loaded: dict[str, Any]) -> None:
    assert loaded[stage]["ours, same"] is None
    refused = loaded[stage]["ours, other"]
    assert "step_00000002: was trained on other frozen weights of base than those loaded now" in refused
