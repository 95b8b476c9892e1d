"""SLAM-LLM's files: its names, its values, and nothing that would have to be run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train.projector import Projector, load_projector
from tests.tools.convert.fixtures import Convert
from tests.tools.convert.runs import MakeRun, filled, predictions


def test_there_and_back(made: MakeRun, convert: Convert) -> None:
    run = made("lora")
    file = convert(run.path, "slam", name="slam") / "model.pt"
    held = torch.load(file, weights_only=True)
    own = dict(run.model.named_parameters())
    names = {
        "encoder_projector.linear1.weight": "projector.linear1.weight",
        "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": (
            "llm.causal.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        ),
    }
    for theirs, ours in names.items():
        assert torch.equal(held[theirs], own[ours])
    assert len(held) == 4 + 2 * 4 * 2

    assert run.model.projector is not None
    fresh = Projector(64, 64, run.recipe.simulation)
    load_projector(fresh, str(file))  # as simulation.projector reads it
    assert torch.equal(fresh.linear2.weight, run.model.projector.linear2.weight)
    back = convert(file, "portable", "--run", run.path, name="back")
    torch.testing.assert_close(predictions(filled(run, back), run), predictions(run.model, run), rtol=0, atol=0)
    adapter = convert(file, "peft", "--run", run.path, name="adapter")  # the run tells the scale
    assert (adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_foreign_projector_changes_only_the_projector(
    name: str, made: MakeRun, convert: Convert, tmp_path: Path
) -> None:
    run = made("lora")
    assert run.model.projector is not None
    values = {key: torch.randn_like(x) for key, x in run.model.projector.state_dict().items()}
    foreign = {f"encoder_projector.{key}": x for key, x in values.items()} | {"encoder.conv.weight": torch.ones(2)}
    (tmp_path / "foreign").mkdir()
    torch.save(foreign, tmp_path / "foreign" / name)
    back = filled(run, convert(tmp_path / "foreign", "portable", "--run", run.path))
    assert back.projector is not None
    for key, value in back.projector.state_dict().items():
        assert torch.equal(value, values[key])
    for (key, value), before in zip(back.named_parameters(), run.model.parameters(), strict=True):
        assert key.startswith("projector.") or torch.equal(value, before)


def test_our_names_in_deepspeeds_consolidated_file(made: MakeRun, convert: Convert, tmp_path: Path) -> None:
    run = made("lora")
    trained = {key: x.detach() for key, x in run.model.named_parameters() if x.requires_grad}
    torch.save(trained, tmp_path / "pytorch_model.bin")
    back = convert(tmp_path / "pytorch_model.bin", "portable", "--run", run.path)
    torch.testing.assert_close(predictions(filled(run, back), run), predictions(run.model, run), rtol=0, atol=0)


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[list[str]]]:
        return subprocess.check_call, (["touch", str(self.mark)],)


def test_what_is_refused(made: MakeRun, tmp_path: Path, refused: Callable[..., str]) -> None:
    run = made("lora")
    file = tmp_path / "model.pt"
    torch.save({"encoder_projector.linear1.weight": torch.ones(2), "more": Harmful(tmp_path / "ran")}, file)
    line = refused(file, "portable", "--run", run.path)
    assert "check_call would have to be run" in line and not (tmp_path / "ran").exists()

    wide = Projector(64, 64, run.recipe.simulation.model_copy(update={"projector_width": 9})).state_dict()
    torch.save({f"encoder_projector.{key}": x for key, x in wide.items()}, file)
    assert "projector.linear1" in refused(file, "portable", "--run", run.path)
    torch.save({f"encoder_projector.{key}": x * torch.nan for key, x in wide.items()}, file)
    assert "not finite" in refused(file, "portable", "--run", run.path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refused(file, "portable", "--run", run.path)
