from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.rank import check_size
from dist_train.world_size import check_world_size, foresee
from sharding.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "shards", train=9, valid=1, test=0)


def test_every_rank_needs_a_clip_and_every_micro_step_one_of_the_batch() -> None:
    check_world_size("data", 9, 9)
    check_world_size("data", 9, 4, batch=8, accumulation=2)
    with pytest.raises(UserError, match=r"data: has 9 training clips for 10 ranks\. Use at most 9 ranks"):
        check_world_size("data", 9, 10, batch=99)
    with pytest.raises(UserError, match=r"data\.batch: 7 clips cannot feed 4 ranks × 2 micro-steps. Write at least 8"):
        check_world_size("data", 9, 4, batch=7, accumulation=2)


@pytest.mark.parametrize("training", ["", "training: {epochs: 3}", "training: null", "training: 7"])
@pytest.mark.parametrize("batch", ["", ", batch: 96", ", batch: many", ", batch: true"])
def test_only_what_is_certain_is_foreseen(batch: str, training: str, shards: Path, tmp_path: Path) -> None:
    """The rest of a recipe may be wrong: rank 0 tells all of it at once."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{path: {shards}{batch}}}\n{training}\nnonsense: 1\n")
    foresee(path, ["no override"], 9)
    if training != "training: 7":
        with pytest.raises(UserError, match="has 9 training clips for 10 ranks"):
            foresee(path, [], 10)
        with pytest.raises(UserError, match=r"data\.batch: 8 clips cannot feed 3 ranks × 3"):
            foresee(path, ["data.batch=8", "training.accumulation=3"], 3)


def test_rank_0_checks_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun or srun nobody foresaw anything."""
    made = tiny.recipe(shards, data={"batch": 96})
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 9)
    check_size(made)
    with pytest.raises(UserError, match=r"data\.batch: 96 clips cannot feed 9 ranks × 11"):
        check_size(tiny.recipe(shards, data={"batch": 96}, training={"accumulation": 11}))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 10)
    with pytest.raises(UserError, match="has 9 training clips for 10 ranks"):
        check_size(made)


@pytest.mark.parametrize("text", ["", "data: 3", "data: {}", "data: {path: 3}", "data: {path: gone}", "data: [path]"])
def test_data_that_rank_0_will_refuse_is_left_to_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    foresee(tmp_path / "recipe.yaml", [], 1000)
