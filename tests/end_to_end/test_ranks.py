"""Real processes over gloo: the loss over ranks, ZeRO stages, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.mark.parametrize("rollout", ["prefix", pytest.param("generate", marks=pytest.mark.slow)])
def test_loss_and_gradients_do_not_depend_on_the_number_of_ranks(rollout: str, data: Path, tmp_path: Path) -> None:
    """22 clips in batches of 9: an uneven last batch of 4, unequal rows per rank, clips that lack a modality."""
    found = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        losses = run_ranks("gradients", ranks, folder, data=str(data), batch=9, rollout=rollout)["losses"]
        found[ranks] = losses, torch.load(folder / "gradients.pt", weights_only=True)
    losses, gradients = found[1]
    assert [row["clips"] for row in losses] == [9, 9, 4]
    for ranks in (2, 4):
        for row, expected in zip(found[ranks][0], losses, strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
        assert found[ranks][1].keys() == gradients.keys()
        for step in range(len(losses)):
            names = [name for name in gradients if name.startswith(f"{step}.")]
            whole = torch.cat([gradients[name].double().flatten() for name in names])
            other = torch.cat([found[ranks][1][name].double().flatten() for name in names])
            assert whole.norm() > 0.1
            assert (other - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize(
    ("precision", "numbers", "tolerance", "term_tolerance"),
    [("fp32", [0, 1, 2, 3], 1e-6, 1e-6), pytest.param("bf16", [1, 0, 2, 3], 5e-3, 0.1, marks=pytest.mark.slow)],
)
def test_all_zero_stages_train_alike(
    precision: str, numbers: list[int], tolerance: float, term_tolerance: float, data: Path, tmp_path: Path
) -> None:
    """2 ranks, 2 micro-steps per step, nothing kept whole in stage 3.

    In bf16 the stages add gradients in other orders and types; a small distillation term then drifts by percents
    within four steps, the loss by parts of a thousand, while the first step (same weights) is the same.
    """
    found = run_ranks("stages", 2, tmp_path, data=str(data), precision=precision, numbers=numbers, accumulation=2)
    reference = found[str(numbers[0])]
    assert len(reference) == 4 and abs(reference[0]["loss"] / reference[-1]["loss"] - 1) > 10 * tolerance
    for number in numbers[1:]:
        for row, expected in zip(found[str(number)], reference, strict=True):
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=max(tolerance, 1e-5) * 10)
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5 if row["step"] == 1 else tolerance)
            terms, others = ({k: v for k, v in x.items() if k.startswith("loss/")} for x in (row, expected))
            assert terms == pytest.approx(others, rel=term_tolerance)


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        ("fp32", 2),
        ("bf16", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 0))),
    ],
)
def test_a_stopped_run_continues_with_identical_losses(precision: str, stage: int, data: Path, tmp_path: Path) -> None:
    """A signal to one rank in the middle of the first epoch; dropout is on, so its random numbers must continue too."""
    found = run_ranks("resumed", 2, tmp_path, data=str(data), precision=precision, stage=stage)
    assert len(found["whole"]) == 8
    assert found["first"] == found["whole"][:3]
    assert found["parts"] == found["whole"]
