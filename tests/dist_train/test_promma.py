"""ProMMA's parts against their definitions, and what the evaluator decides."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dist_train.build import build_collator, build_model, open_split
from dist_train.evaluate import predict, score
from dist_train.fusion import FusionNetwork, FusionSettings, FusionWidths
from dist_train.imagination import ImaginationSettings
from dist_train.losses import worth_loss
from dist_train.missing import Streams
from dist_train.packed import TextStates
from dist_train.promma import Attention, ProMMA
from dist_train.recipe import validate
from dist_train.task import TaskSettings
from sharding.errors import UserErrors
from tests import tiny

WIDTHS = FusionWidths(audio=7, text=9, vision=5)
TEXT_GONE = (False, True, False)


def streams(rows: int, padding: int = 0) -> Streams:
    torch.manual_seed(7)
    made = []
    for width in WIDTHS:
        lengths = torch.randint(1, 7, (rows, 1))
        mask = torch.arange(6 + padding) < lengths
        states = torch.randn(rows, 6, width, dtype=torch.float64)
        junk = torch.full((rows, padding, width), 9.0, dtype=torch.float64)
        made.append(TextStates(torch.where(mask[..., None], torch.cat([states, junk], 1), 9.0), mask))
    return Streams(*made)


def network() -> FusionNetwork:
    imagination = ImaginationSettings(kind="promma", prompts=3, levels=2, heads=2)
    fusion = FusionNetwork(WIDTHS, FusionSettings(width=8), imagination).double()
    for parameter in fusion.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.4)
    return fusion


def test_attention_equals_torchs() -> None:
    ours, reference = Attention(8, 2).double(), nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        parts = (ours.query, ours.key, ours.value)
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(ours.out.state_dict())
    asking, steps = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    expected, _ = reference(asking, steps, steps, key_padding_mask=~mask)
    torch.testing.assert_close(ours(asking, steps, mask), expected)


def test_what_is_there_weighs_one_and_what_is_imagined_its_squared_cosine() -> None:
    promma = ProMMA(8, modalities=3, prompts=2, levels=1, heads=2, dropout=0.0).double()
    sequences = [torch.randn(4, t, 8, dtype=torch.float64) for t in (5, 3, 2)]
    masks = [torch.ones(x.shape[:2], dtype=torch.bool) for x in sequences]
    imagined = torch.tensor([TEXT_GONE, (False, False, False), (True, False, True), TEXT_GONE])
    found, longer, weights = promma(sequences, masks, imagined)
    assert [x.shape[1] for x in found] == [7, 5, 4] and [m.shape[1] for m in longer] == [7, 5, 4]
    assert (weights[~imagined] == 1).all() and (weights[imagined] < 1).all() and (weights >= 0).all()
    shared, private = promma.prompts(imagined)
    undamped = []
    for steps, own, levels in zip(sequences, private, promma.levels, strict=True):
        joined = torch.cat([own, steps], 1)
        for level in levels.children():
            joined = level(joined, torch.ones(joined.shape[:2], dtype=torch.bool), shared)
        undamped.append(joined)
    seen = []
    for steps, own in zip(undamped, promma.weights.own, strict=True):
        mask = torch.ones(steps.shape[:2], dtype=torch.bool)
        seen.append(own(promma.weights.look(shared.expand(4, -1, -1), steps, mask).mean(1)))
    for row, number in ((0, 1), (2, 0)):
        own, others = seen[number][row], sum(seen[m][row] for m in range(3) if m != number) / 2
        rho = (own @ others / own.norm() / others.norm()).item()
        information = -math.log(1 - rho**2) / 2
        assert weights[row, number].item() == pytest.approx(1 - math.exp(-2 * information), abs=1e-5)
        torch.testing.assert_close(found[number][row], undamped[number][row] * rho**2, rtol=1e-4, atol=1e-5)


def test_padding_and_neighbours_play_no_part_and_everything_learns() -> None:
    fusion = network()
    dropped = torch.tensor([TEXT_GONE] * 5)
    fusion.eval()
    short, long = streams(5), streams(5, padding=4)
    one, two = (fusion(x, x, dropped).missing for x in (short, long))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    alone = Streams(*(TextStates(x.states[2:3], x.mask[2:3]) for x in short))
    torch.testing.assert_close(fusion(alone, alone, dropped[:1]).missing.prediction, one.prediction[2:3])
    fused = fusion.train()(short, short, dropped, torch.randn(5, dtype=torch.float64))
    sum(x.square().sum() for x in (*fused.complete, *fused.missing)).backward()
    assert not [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert fused.notes["gain"].shape == (5,) and not fused.notes["gain"].requires_grad


def test_evaluator_loss_counts_the_clips_it_is_asked_about() -> None:
    worth = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [5.0, 0.0, 0.0]])
    expected = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0))) / 2
    assert worth_loss(worth, torch.tensor([0.3, -0.2, -1.0])).item() == pytest.approx(expected, abs=1e-6)
    assert worth_loss(worth * torch.tensor([1.0, 0.0, 1.0]), torch.ones(3)).item() == 0


@pytest.mark.usefixtures("world_of_one")
def test_clips_that_are_not_worth_it_are_never_decoded(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """They come out as with nothing imagined; the others as with everything imagined."""
    shards = tiny.write_corpus(tmp_path / "shards", train=4, valid=2, test=9)
    recipe = tiny.recipe(
        shards,
        widths={"vision": tiny.VISION_WIDTH},
        simulation={"rollout": "generate"},
        imagination={"kind": "promma", "heads": 2},
    )
    model = build_model(recipe, tokenizer).eval()
    with torch.no_grad():
        for parameter in (*model.fusion.parameters(), *model.llm.parameters()):
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    assert model.evaluator is not None
    split, collate = open_split(recipe, "test"), build_collator(recipe, tokenizer, model)
    asked: list[int] = []
    given = model.llm.answers

    def counted(audio: TextStates, wanted: torch.Tensor, known: object) -> object:
        asked.append(int(wanted.sum()))
        return given(audio, wanted, known)  # type: ignore[arg-type]

    model.llm.answers = counted  # type: ignore[method-assign,assignment]
    found = {}
    for threshold in (0.0, 0.5, 1.0):
        model.threshold = threshold
        asked.clear()
        predictions = predict(model, split, collate, batch=4, workers=0)
        assert predictions.imagined is not None
        wanted, imagined = predictions.imagined.sum(0).astype(int)
        assert wanted == predictions.present[:, 0].sum() and sum(asked) == imagined
        found[threshold] = predictions
        assert score(predictions, np.zeros(3), TaskSettings())["imagination"] == {
            "wanted": wanted,
            "imagined": imagined,
        }
        if threshold == 0:  # set the evaluator so that about half of the clips are worth it
            logits = torch.cat([model.streams(collate([{**split[i], "real": True}])).notes["worth"] for i in range(9)])
            with torch.no_grad():
                model.evaluator.judge[2].bias -= logits[logits[:, 1] > 0, 0].median() - 1e-4  # type: ignore[operator]
    middle = found[0.5].imagined
    assert middle is not None and 0 < middle[:, 1].sum() < middle[:, 0].sum()
    for row in range(9):
        other = found[0.0 if middle[row, 1] else 1.0]
        assert found[0.5].missing[row] == pytest.approx(other.missing[row], rel=1e-4, abs=1e-4)
        assert found[0.5].complete[row] == pytest.approx(found[0.0].complete[row], rel=1e-4, abs=1e-4)
    assert not np.allclose(found[0.0].missing, found[1.0].missing, atol=1e-4)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    values = tiny.recipe(Path("none")).model_dump()
    values["imagination"] = {"kind": "promma", "heads": 3}
    with pytest.raises(UserErrors, match=r"imagination\.heads: is 3, which does not divide fusion\.width = 16"):
        validate(values)
    assert validate({**values, "imagination": "promma", "fusion": {"width": 16}}).imagination.kind == "promma"
