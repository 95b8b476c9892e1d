"""Missing and noisy modalities at evaluation: against clips that really lack them, and against their definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from dist_train import figures
from dist_train.build import build_collator, build_model, open_split
from dist_train.evaluate import predict
from dist_train.metrics import valence_metrics
from dist_train.model import DoubleFlow
from dist_train.names import MODALITIES
from dist_train.packed import TextStates
from dist_train.report import write_report
from dist_train.robustness import NOISES, PATTERNS, RATES, Noise, Outcomes, noisy, outcomes, summarise
from dist_train.robustness_record import Robustness
from tests import tiny

pytestmark = pytest.mark.usefixtures("world_of_one")


def run(
    shards: Path, tokenizer: PreTrainedTokenizerBase, batch: int = 4, **changes: Any
) -> tuple[DoubleFlow, Outcomes, Any]:
    """A model with large weights, what it says under all conditions, and what `predict` says."""
    made = tiny.recipe(shards, widths={"vision": tiny.VISION_WIDTH}, **changes)
    model = build_model(made, tokenizer).eval()
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    split, collate = open_split(made, "test"), build_collator(made, tokenizer, model)
    found = outcomes(model, split, collate, batch=batch, workers=0)
    return model, found, (split, collate, predict(model, split, collate, batch=batch, workers=0))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "shards", train=4, valid=2, test=9)


@pytest.mark.parametrize("rollout", ["prefix", "generate"])
def test_patterns_equal_clips_that_lack_the_modalities(
    shards: Path, tokenizer: PreTrainedTokenizerBase, rollout: str
) -> None:
    """Audio or vision dropped = a clip without it in the complete flow, where no text is missing and so none imagined;
    text dropped = the missing flow of `predict`.
    """
    model, found, (split, collate, both) = run(shards, tokenizer, simulation={"rollout": rollout})
    assert next(iter(PATTERNS)) == "audio+text+vision" and len(PATTERNS) == 7
    np.testing.assert_allclose(found.predicted["audio+text+vision"], both.complete, atol=1e-5)
    np.testing.assert_allclose(found.predicted["audio+vision"], both.missing, atol=1e-5)
    for name, there in PATTERNS.items():
        for row in range(len(split)):
            sample = {**split[row], "real": True}
            for modality, has in zip(MODALITIES, there, strict=True):
                if not has and modality != "text":
                    sample[modality] = None
            with torch.no_grad():
                alone = model(collate([sample]))
            expected = (alone.complete if there[1] else alone.missing).prediction.item()
            assert found.predicted[name][row] == pytest.approx(expected, abs=1e-4), (name, row)


def test_outcomes_do_not_depend_on_the_batch(shards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    refine = {"kind": "vgmr", "width": 8}
    _, small, _ = run(shards, tokenizer, batch=2, refine=refine)
    _, large, _ = run(shards, tokenizer, batch=9, refine=refine)
    assert set(small.values) == {"clean", *(noise.name for noise in NOISES)}
    for part in ("predicted", "values"):
        for name, column in getattr(small, part).items():
            np.testing.assert_allclose(column, getattr(large, part)[name], atol=1e-5, err_msg=name)
    assert not np.allclose(small.predicted["text ratio 0.5/complete"], small.predicted["audio+text+vision"])
    np.testing.assert_allclose(small.predicted["text ratio 0.5/complete"].shape, (9,))


@pytest.mark.parametrize("kind", ["ratio", "weight"])
def test_noise_is_what_it_says(kind: str) -> None:
    mask = torch.arange(400) < torch.tensor([[400], [200]])
    clean = TextStates(5 * torch.randn(2, 400, 30), mask)
    made = noisy(clean, Noise(1, kind, 0.3), [7, 3])
    assert torch.equal(made.states[~mask], clean.states[~mask]) and torch.equal(made.mask, mask)
    difference = made.states - clean.states
    for row, steps in enumerate((400, 200)):
        hit = (difference[row] != 0).any(1)
        assert hit.sum() == (round(0.3 * steps) if kind == "ratio" else steps)
        noise = made.states[row][hit] if kind == "ratio" else difference[row][hit] / 0.3
        assert noise.square().mean().sqrt().item() == pytest.approx(5, rel=0.1)
    again = noisy(TextStates(clean.states[1:], mask[1:]), Noise(1, kind, 0.3), [3])
    assert torch.equal(again.states[0], made.states[1])


def random_outcomes(clips: int = 60) -> Outcomes:
    rng = np.random.default_rng()
    names = [*PATTERNS, *(f"{noise.name}/{flow}" for noise in NOISES for flow in ("complete", "missing"))]
    values = {"clean": rng.uniform(size=(clips, 3, 3)), "text ratio 0.3": rng.uniform(size=(clips, 3, 3))}
    return Outcomes(rng.uniform(-3, 3, clips), {name: rng.uniform(-3, 3, clips) for name in names}, values)


def test_curves_end_in_the_patterns() -> None:
    found = random_outcomes()
    result = summarise(found, found.label, "test")
    for number, modality in enumerate(MODALITIES):
        curve = result.missing_rate[modality]
        assert [point.rate for point in curve] == list(RATES)
        lacking = "+".join(name for name in MODALITIES if name != modality)
        for point, pattern in ((curve[0], "audio+text+vision"), (curve[-1], lacking)):
            expected = valence_metrics(found.predicted[pattern], found.label)
            assert point.value("mae") == pytest.approx(expected["mae"]) and point.value("mae_std") == pytest.approx(
                0, abs=1e-9
            )
        # half way: between the ends, as each clip counts in one of the two ways
        ends = sorted((curve[0].value("mae"), curve[-1].value("mae")))
        assert ends[0] - 0.2 < curve[5].value("mae") < ends[1] + 0.2, number
        assert curve[5].value("mae_std") > 0
    one = np.mean([valence_metrics(found.predicted[name], found.label)["mae"] for name in list(PATTERNS)[1:4]])
    assert result.missing_rate["random"][-1].value("mae") == pytest.approx(one, abs=0.3)


def test_the_report_shows_it_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def sketch(draw: Any) -> bytes:
        draw()
        drawn.append(draw.func.__name__)
        return b"png"

    monkeypatch.setattr(figures, "render", sketch)
    found = random_outcomes()
    (tmp_path / "summary.json").write_text("{}")
    path = tmp_path / "robustness_test.json"
    path.write_text(summarise(found, found.label, "test").model_dump_json())
    text = write_report(tmp_path).read_text()
    assert {"missing_rates", "patterns", "noise", "values"} <= set(drawn) and "When clips lack a modality" in text
    whole = json.loads(path.read_text())
    damages: list[dict[str, Any]] = [
        {"values": {"clean": [[0.1], [0.2]]}},
        {"missing_rate": {"smell": []}},
        {"missing_rate": {"text": []}},
        {"patterns": {"$x$": {"mae": 1.0}}},
        {"floor": {}},
        {"noise": {"text": {"ratio": []}}},
        {"values": {"clean": [[float("inf")] * 3] * 3}},
    ]
    for damage in damages:
        with pytest.raises(ValidationError):
            Robustness.model_validate({**whole, **damage})
        path.write_text(json.dumps({**whole, **damage}))
        assert "robustness_test.json is damaged" in write_report(tmp_path).read_text()
