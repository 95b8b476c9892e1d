"""SDUMC's fusion checkpoint: the official network predicts what ours predicts, for both skips, there and back."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_train.imagination import Skip
from dist_train.missing import Streams
from dist_train.packed import TextStates
from tests.tools.convert.fixtures import Convert
from tests.tools.convert.official_sdumc import Holder, Official
from tests.tools.convert.runs import Made, MakeRun, filled

REFERENCE = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "sdumc_reference.safetensors"
SKIPS: list[Skip] = ["text", "transition"]


def run_of(made: MakeRun, skip: Skip) -> Made:
    return made(
        "lora",
        fusion={"width": 256},
        imagination={"skip": skip, "pooled_bottleneck": 128, "views_bottleneck": 64},
    )


def clips(widths: tuple[int, int, int]) -> list[list[Tensor]]:
    # In double: with weights as they come the predictions are hundreds, sums of what nearly cancels.
    shapes = list(zip((5, 4, 3), widths, strict=True))
    return [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(3)]


@torch.no_grad()
def ours(fusion: Any, chosen: list[list[Tensor]]) -> Tensor:
    """[2, clips] of both flows; the text stands for the simulated one too."""
    rows = [[x[None] for x in clip] for clip in chosen]
    found, fusion = [], deepcopy(fusion).double()  # other tests have the same run
    for row in rows:
        streams = Streams(*(TextStates(x, torch.ones(x.shape[:2], dtype=torch.bool)) for x in row))
        flows = fusion(streams, streams, torch.tensor([[False, True, False]]))
        found.append(torch.cat([flow.prediction for flow in flows[:2]]))
    return torch.stack(found, 1)


def theirs(network: Official, chosen: list[list[Tensor]]) -> Tensor:
    network = network.double()
    return torch.stack([torch.stack([network(clip, missing=flow) for clip in chosen]) for flow in (False, True)])


@pytest.mark.parametrize("skip", SKIPS)
def test_there(skip: Skip, made: MakeRun, convert: Convert) -> None:
    run = run_of(made, skip)
    widths = (64, 64, run.recipe.widths.vision)
    held = torch.load(convert(run.path, "sdumc") / "fusion.pt", weights_only=True)
    official = Holder(Official(*widths, skip=skip)).eval()
    official.load_state_dict(held["state_dict"], strict=True)
    chosen = clips(widths)
    torch.testing.assert_close(theirs(official.model, chosen), ours(run.model.fusion, chosen))


@pytest.mark.parametrize("skip", SKIPS)
def test_and_back(skip: Skip, made: MakeRun, convert: Convert, tmp_path: Path) -> None:
    run = run_of(made, skip)
    widths = (64, 64, run.recipe.widths.vision)
    official = Holder(Official(*widths, skip=skip)).eval()
    optimizer = torch.optim.Adam(official.parameters()).state_dict()  # as the official script saves it
    file = tmp_path / "valid_mosei.pt"
    torch.save({"epoch": 3, "state_dict": official.state_dict(), "optimizer": optimizer}, file)
    back = filled(run, convert(file, "portable", "--run", run.path))
    chosen = clips(widths)
    torch.testing.assert_close(ours(back.fusion, chosen), theirs(official.model, chosen))


@pytest.mark.skipif(not REFERENCE.exists(), reason="no reference values of the official code beside the checkout")
@pytest.mark.parametrize("skip", SKIPS)
def test_the_network_written_out_here_is_the_official_one(skip: Skip) -> None:
    reference = load_file(REFERENCE)
    names = {k.removeprefix("weights."): v for k, v in reference.items() if k.startswith("weights.")}
    audio, real, simulated, vision = (reference[f"in.{name}"] for name in ("audio", "text", "simulated", "vision"))
    network = Official(24, 40, 16, skip=skip).eval()
    network.load_state_dict(
        {k: v for k, v in names.items() if skip == "transition" or not k.startswith("normali.")}, strict=True
    )
    for flow, text in (("complete", real), ("missing", simulated)):
        found = torch.stack(
            [network([a, t, v], missing=flow == "missing") for a, t, v in zip(audio, text, vision, strict=True)]
        )
        torch.testing.assert_close(found, reference[f"{skip}.out.{flow}.prediction"].flatten(), rtol=1e-4, atol=1e-5)


def test_what_is_refused(made: MakeRun, refused: Callable[..., str], tmp_path: Path) -> None:
    run = run_of(made, "text")
    widths = (64, 64, run.recipe.widths.vision)
    file = tmp_path / "fusion.pt"
    torch.save({"state_dict": Holder(Official(*widths, skip="transition")).state_dict()}, file)
    line = refused(file, "portable", "--run", run.path)
    assert "skips from the transition, the run's from the text" in line
    torch.save({"state_dict": Holder(Official(9, 9, 9, skip="text")).state_dict()}, file)
    assert "has fusion.projections" in refused(file, "portable", "--run", run.path)
    torch.save(Official(*widths, skip="text"), file)  # the whole module: classes would have to be imported
    assert "Official would have to be run" in refused(file, "portable", "--run", run.path)
