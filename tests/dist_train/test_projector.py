"""Pre-trained projectors: from runs of ours and from SLAM-LLM's files, never another one silently."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_train.build import build_model, fit_to_dataset
from dist_train.projector import Projector, load_projector
from dist_train.rollout import SimulationSettings
from sharding import portable
from sharding.errors import UserError
from tests import tiny

SETTINGS = SimulationSettings(projector_width=7)


def projector() -> Projector:
    return Projector(3, 4, SETTINGS)


def named(prefix: str) -> dict[str, Tensor]:
    """Random weights of a projector under foreign names, beside others."""
    weights = {f"{prefix}{name}": torch.randn_like(value) for name, value in projector().state_dict().items()}
    return {**weights, "llm.base_model.q_proj.lora_A.default.weight": torch.randn(2, 2)}


def check(path: Path, weights: dict[str, Tensor]) -> None:
    made = projector()
    load_projector(made, str(path))
    for name, value in made.state_dict().items():
        (expected,) = (one for key, one in weights.items() if key.endswith(f"projector.{name}"))
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("nested", [False, True])
def test_files_of_slam_llm(name: str, nested: bool, tmp_path: Path) -> None:
    weights = named("encoder_projector.")
    torch.save({"model": weights} if nested else weights, tmp_path / name)
    check(tmp_path / name, weights)
    check(tmp_path, weights)


def test_a_run_of_ours_and_its_checkpoint(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "step_00000003"
    best.parent.mkdir()
    weights = named("projector.")
    portable.write(best, weights.items(), [], {}, shard_bytes=100)
    (best.parent / "best").symlink_to(best.name)
    check(tmp_path, weights)
    check(best, weights)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    wider = Projector(3, 4, SimulationSettings(projector_width=9)).state_dict()
    for expected, state in (
        ("linear1.weight of shape [9, 15], this model needs [7, 15]", wider),
        ("holds no weights *projector.linear1.weight", {"weight": torch.ones(2)}),
    ):
        torch.save({f"encoder_projector.{name}": value for name, value in state.items()}, tmp_path / "model.pt")
        with pytest.raises(UserError) as caught:
            load_projector(projector(), str(tmp_path))
        assert expected in str(caught.value)
    torch.save({"encoder_projector.linear1.weight": Harmful()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_projector(projector(), str(tmp_path))
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"PK\x03\x04 cut"):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_projector(projector(), str(tmp_path))
    for odd in (torch.full((7, 15), torch.nan), torch.ones(7, 15, dtype=torch.int32)):
        state = {f"encoder_projector.{name}": x for name, x in projector().state_dict().items()}
        torch.save({**state, "encoder_projector.linear1.weight": odd}, tmp_path / "model.pt")
        with pytest.raises(UserError, match=r"values in linear1.weight that are not finite numbers"):
            load_projector(projector(), str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        load_projector(projector(), str(tmp_path))
    with pytest.raises(UserError, match="is no file, nor a directory with"):
        load_projector(projector(), str(tmp_path / "absent"))


def test_a_model_starts_from_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = fit_to_dataset(tiny.recipe(tiny.write_corpus(tmp_path / "shards")))
    first = build_model(recipe, tokenizer)
    assert first.projector is not None
    weights = {f"encoder_projector.{name}": torch.randn_like(x) for name, x in first.projector.state_dict().items()}
    torch.save(weights, tmp_path / "model.pt")
    recipe.simulation.projector = str(tmp_path / "model.pt")
    second = build_model(recipe, tokenizer)
    assert second.projector is not None
    for name, value in second.projector.state_dict().items():
        assert torch.equal(value, weights[f"encoder_projector.{name}"])
    after = second.state_dict()
    for name, value in first.state_dict().items():
        assert name.startswith("projector") or torch.equal(value, after[name])
    (tmp_path / "model.pt").unlink()
    build_model(recipe, tokenizer, resumed=True)  # a checkpoint fills it: the file is not needed again
