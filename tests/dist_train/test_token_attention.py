"""The attention of CMPT's tokens against float64 loops over the model's own weights, and what a report reads of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from dist_train import wavlm
from dist_train.attention_figures import token_attention as draw
from dist_train.build import build_collator, build_model, open_split
from dist_train.evaluate import chosen_rows, evaluate_checkpoint, predict
from dist_train.model import DoubleFlow
from dist_train.recipe import Recipe
from dist_train.report_clips import cards
from dist_train.run_directory import RunDirectory
from dist_train.run_record import read_run
from dist_train.token_attention import heard_targets, token_attention, write_attention
from tests import tiny

CMPT: dict[str, Any] = {"imagination": {"kind": "cmpt", "heads": 2}, "simulation": {"rollout": "none"}}
LORA = {"tuning": "lora", "lora": {"rank": 2, "alpha": 8}}


def recipe_of(shards: Path, *changes: dict[str, Any]) -> Recipe:
    """Nested settings merged in, one after the other."""
    values: dict[str, Any] = {"widths": {"vision": tiny.VISION_WIDTH}}
    for change in changes:
        tiny.merge(values, copy.deepcopy(change))
    return tiny.recipe(shards, **values)


def build(tokenizer: PreTrainedTokenizerBase, *changes: dict[str, Any], kind: str = "wavlm") -> tuple[DoubleFlow, Any]:
    """A model in float64 with weights far from their start, and its collator."""
    recipe = recipe_of(Path("none"), CMPT, *changes)
    if kind != "wavlm":
        assert recipe.audio.config is not None
        fields = {name: value for name, value in recipe.audio.config.items() if name != "num_buckets"}
        audio = recipe.audio.model_copy(update={"config": {**fields, "model_type": kind}})
        recipe = recipe.model_copy(update={"audio": audio})
    torch.manual_seed(int(np.random.default_rng().integers(1 << 31)))
    model = build_model(recipe, tokenizer).double().eval()
    collate = build_collator(recipe, tokenizer, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("attention" in name or "tokens" in name or "lora" in name):
                parameter.normal_(std=0.6)
    return model, collate


def doubled(batch: Any) -> Any:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def loop(attention: Any, states: torch.Tensor, bias: torch.Tensor | None, count: int) -> np.ndarray:
    """[count, T], mean over heads: one query, one head, one key at a time."""
    heads, frames = attention.num_heads, len(states)
    query, key = (part(states[None])[0].reshape(frames, heads, -1) for part in (attention.q_proj, attention.k_proj))
    weights = np.zeros((heads, count, frames))
    for head in range(heads):
        for i in range(count):
            scores = []
            for j in range(frames):
                score = float(query[i, head] @ key[j, head]) / math.sqrt(query.shape[2])
                if bias is not None:  # arXiv 2110.13900, equations 3 to 5
                    part = states[i].reshape(heads, -1)[head]
                    update, reset = torch.sigmoid(attention.gru_rel_pos_linear(part).reshape(2, 4).sum(1))
                    constant = attention.gru_rel_pos_const[0, head, 0, 0]
                    score += float((update * (reset * constant - 1) + 2) * bias[head, j - i + frames - 1])
                scores.append(score)
            total = sum(math.exp(score - max(scores)) for score in scores)
            weights[head, i] = [math.exp(score - max(scores)) / total for score in scores]
    return weights.mean(0)


@pytest.mark.parametrize("kind", ["wavlm", "hubert", "wav2vec2"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_weights_in_a_speech_encoder(kind: str, tuning: str, tokenizer: PreTrainedTokenizerBase) -> None:
    changes = {"missing": "random", "audio": LORA if tuning == "lora" else {}}
    model, collate = build(tokenizer, changes, kind=kind)
    entered: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    layers: Any = model.audio.model.encoder.layers  # type: ignore[union-attr]
    for layer in layers:
        layer.attention.register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        if kind == "wavlm":
            layer.attention.register_forward_hook(lambda _, __, output: biases.append(output[2]))
    clip = {"key": "k", "index": 0, "real": True, **tiny.clip(np.random.default_rng())}
    batch = doubled(collate([clip]))
    before = model(batch).missing.prediction
    entered.clear(), biases.clear()  # type: ignore[func-returns-value]
    found = token_attention(model, batch)
    frames = entered[0].shape[1]
    assert found.shape == (len(layers), 3, frames) and len(layers) == 2 and frames > 6
    for number, layer in enumerate(layers):
        bias = biases[number] if kind == "wavlm" else None
        with torch.no_grad():
            expected = loop(layer.attention, entered[number][0], bias, 3)
        np.testing.assert_allclose(found[number].numpy(), expected, atol=1e-9)
    assert found.std(2).min() > 1e-4  # not flat: the loop has something to tell apart
    torch.testing.assert_close(model(batch).missing.prediction, before)  # watching leaves nothing behind
    assert not any(isinstance(m, wavlm.Attention) and m.watch is not None for m in model.modules())
    assert heard_targets(model) == [1, 2]


def test_weights_over_audio_features(tokenizer: PreTrainedTokenizerBase) -> None:
    model, collate = build(tokenizer, {"audio": {"input": "features"}, "widths": {"audio": 7}})
    rng = np.random.default_rng()
    sample = {**tiny.clip(rng), "audio": rng.normal(size=(9, 7)).astype(np.float32)}
    batch = doubled(collate([{"key": "k", "index": 0, "real": True, **sample}]))
    found = token_attention(model, batch)
    assert model.fusion.cmpt is not None and found.shape == (1, 1, 10)
    branch: Any = model.fusion.cmpt.branches["audio"]
    with torch.no_grad():
        steps = model.fusion.projections[0](batch["audio"])[0]
        joined = branch.norm(torch.cat([branch.tokens, steps]))
        query, key = branch.attention.query(joined[:1]), branch.attention.key(joined)
    expected = np.zeros(10)
    for head in range(2):
        columns = slice(8 * head, 8 * head + 8)
        scores = [float(query[0, columns] @ row[columns]) / math.sqrt(8) for row in key]
        expected += np.exp(scores) / np.exp(scores).sum() / 2
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-9)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("system", ["cmpt", "mia", "audio", "mix"])
def test_evaluation_keeps_it_for_the_clips_that_are_shown(
    system: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"mia": {}, "audio": {**CMPT, "missing": "audio"}}.get(system, CMPT)
    shards = tiny.write_corpus(tmp_path / "shards", train=4, valid=2, test=14)
    data: dict[str, Any] = {"path": str(shards)}
    if system == "mix":  # of names that sort otherwise than their keys: a-b/test000 comes before a/test000
        other = tiny.write_corpus(tmp_path / "other", train=4, valid=2, test=14, seed=1)
        data = {"path": None, "sources": [{"path": str(shards), "name": "a"}, {"path": str(other), "name": "a-b"}]}
    recipe = recipe_of(shards, changes, {"data": data})
    model = build_model(recipe, tokenizer).eval()
    assert isinstance(model, DoubleFlow)
    collate = build_collator(recipe, tokenizer, model)
    monkeypatch.setattr("dist_train.evaluate.load_trained", lambda *_, **__: (model, collate))
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text(json.dumps({"data": data}))
    (path / "summary.json").write_text("{}")
    (path / "metrics.jsonl").write_text("")
    evaluate_checkpoint(RunDirectory(path), recipe, path, "test", train_labels=np.zeros(3))
    run = read_run(path)
    assert not run.problems
    shown = cards(run)
    if system in ("mia", "audio"):  # no token hears audio
        assert run.attention is None and not any(card["attention"] for card in shown["cards"])
        return
    assert run.attention is not None and run.attention.targets == ["text"]
    assert run.attention.frame_seconds == pytest.approx(0.02)
    split = open_split(recipe, "test")
    predictions = predict(model, split, collate, batch=4, workers=0)
    silent = 0
    for card, row in zip(shown["cards"], chosen_rows(predictions), strict=True):
        key = predictions.keys[row]
        assert card["key"] == key
        if split[row]["audio"] is None:
            assert key not in run.attention.clips and not card["attention"]
            silent += 1
            continue
        assert card["attention"]["image"].startswith("data:image/png") and "text token" in card["attention"]["caption"]
        weights = run.attention.clips[key].astype(np.float64)
        whole = token_attention(model, collate([{**split[row], "real": True}])).numpy()
        np.testing.assert_allclose(weights[..., 1:], whole[..., 1:], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(weights[..., 0], whole[..., 0], rtol=1e-3)
    assert len(run.attention.clips) + silent == 8


def test_the_heatmap_shows_the_weights_over_the_clips_seconds() -> None:
    rng = np.random.default_rng()
    weights = rng.dirichlet(np.ones(41), size=(5, 2))
    figure = draw(weights, ["text", "vision"], 0.02, np.abs(rng.normal(size=20)))
    images = [axes.images[0] for axes in figure.axes if axes.images]
    for number, image in enumerate(images[:2]):
        np.testing.assert_allclose(np.asarray(image.get_array()), weights[:, number, 1:] * 40)
        assert list(image.get_extent()) == pytest.approx([0, 0.8, 0.5, 5.5])
        assert image.get_clim() == images[0].get_clim() and image.origin == "lower"
    assert figure.axes[0].get_xlim() == pytest.approx((0, 0.8))
    assert "step" in draw(weights[:1, :1], ["text"], 0.0, np.empty(0)).axes[0].get_xlabel()


@pytest.mark.parametrize("damage", ["targets", "shape", "nan", "negative", "sum", "name", "seconds", "none"])
def test_only_weights_are_drawn(damage: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "predictions_test.csv").write_text("key,label,complete,missing\na,1,1,1\n")
    weights = np.random.default_rng().dirichlet(np.ones(9), size=(2, 1)).astype(np.float16)
    tensors: dict[str, Any] = {
        "targets": np.array([1], np.uint8),
        "frame_seconds": np.array([0.02], np.float32),
        "clip/a": weights,
    }
    if damage == "targets":
        tensors["targets"] = np.array([7], np.uint8)
    elif damage == "shape":
        tensors["clip/a"] = weights[0]
    elif damage == "name":
        del tensors["targets"]
    elif damage == "seconds":
        tensors["frame_seconds"] = np.array([np.nan], np.float32)
    elif damage != "none":
        weights[0, 0, 0] = {"nan": np.nan, "negative": -weights[0, 0, 0], "sum": 3}[damage]
    save_file(tensors, tmp_path / "attention_test.safetensors")
    assert load_file(tmp_path / "attention_test.safetensors").keys() == tensors.keys()
    run = read_run(tmp_path)
    assert (run.attention is not None) is (damage == "none")
    assert any("attention_test" in problem for problem in run.problems) is (damage != "none")
    assert bool(cards(run)["cards"][0]["attention"]) is (damage == "none")


def test_nothing_is_written_without_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model, collate = build(tokenizer, {"imagination": {"kind": "mia"}})
    write_attention(tmp_path / "file", model, [], collate, [])  # type: ignore[arg-type]
    assert not (tmp_path / "file").exists()
