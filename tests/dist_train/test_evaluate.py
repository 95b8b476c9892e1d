from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerBase

from dist_train import evaluate
from dist_train.build import build_collator, build_model, open_split
from dist_train.evaluate import Predictions, find_checkpoint, judged, predict, score, write_predictions
from dist_train.model import DoubleFlow, Flows, Inputs
from dist_train.names import MODALITIES
from dist_train.packed import Tokens
from dist_train.rank import check_size
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.run_state import check_bases
from dist_train.task import TaskSettings
from sharding.checkpoint import fingerprints
from sharding.errors import UserError, UserErrors
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, Split
from tests import tiny

pytestmark = pytest.mark.usefixtures("world_of_one")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "shards", train=11, valid=2, test=9)


def recipe(shards: Path, **changes: Any) -> Recipe:
    return tiny.recipe(shards, widths={"vision": tiny.VISION_WIDTH}, **changes)


def build(made: Recipe, tokenizer: PreTrainedTokenizerBase) -> DoubleFlow:
    model = build_model(made, tokenizer).eval()
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    return model


def run(made: Recipe, tokenizer: PreTrainedTokenizerBase, model: Any = None, batch: int = 4) -> Predictions:
    known = build(made, tokenizer)
    collate = build_collator(made, tokenizer, known)
    return predict(model or known, open_split(made, "test"), collate, batch=batch, workers=0)


def random_predictions(n: int = 40) -> Predictions:
    rng = np.random.default_rng()
    label, complete, missing = rng.uniform(-3.4, 3.4, (3, n)).astype(np.float32)
    label[::5] = 0
    shown = {name: rng.normal(size=(3, 128)).astype(np.float32) for name in ("complete", "missing")}
    return Predictions(
        keys=[f'k,{i} "é' for i in range(n)],
        rows=list(range(n)),
        label=label,
        complete=complete,
        missing=missing,
        present=rng.random((n, 3)) < 0.5,
        asr=np.zeros((n, 2)),
        said=["", 'a, "b"', "=good film"] + [""] * (n - 3),
        representations={**shown, "label": label[:3]},
        set_aside=[],
    )


def test_each_clip_is_predicted_once_in_key_order(
    shards: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(shards)
    model, split = build(made, tokenizer), open_split(made, "test")
    collate = build_collator(made, tokenizer, model)
    monkeypatch.setattr(evaluate, "SHOWN_CLIPS", 5)
    for batch in (4, 100):
        found = run(made, tokenizer, batch=batch)
        assert found.keys == sorted(split.keys) and len(found.keys) == 9
        for row in range(9):
            sample = split[row]
            alone = model(collate([{**sample, "real": True}]))
            assert found.label[row] == np.float32(sample["label"])
            for flow in ("complete", "missing"):
                output = getattr(alone, flow)
                assert getattr(found, flow)[row] == pytest.approx(output.prediction.item(), abs=1e-5)
                if row < 5:
                    expected = output.representation[0].detach().numpy()
                    assert found.representations[flow][row] == pytest.approx(expected, abs=1e-5)
            present = [sample[name] is not None for name in ("audio", "text", "vision")]
            assert found.present[row].tolist() == present
        assert found.representations["complete"].shape == found.representations["missing"].shape == (5, 128)
        assert found.representations["label"].tolist() == found.label[:5].tolist()
        assert len(set(found.complete.tolist())) == 9


def test_imagined_text_is_kept_as_it_was_decoded(shards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(shards, simulation={"rollout": "generate"})
    model, heard = build(made, tokenizer), {}

    def listening(batch: Any) -> Flows:
        flows = model(batch)
        assert flows.answers is not None
        rows = zip(batch["index"].tolist(), batch["audio_present"].tolist(), *flows.answers, strict=True)
        heard.update(
            {index: str(tokenizer.decode(ids[mask].tolist())) if has else "" for index, has, ids, mask in rows}
        )
        return flows

    found = run(made, tokenizer, listening)
    for index, text in enumerate(found.said):
        assert text.isprintable() and text.split() == heard[index].replace("</s>", "").replace("\0", " ").split()
    assert any(found.said) and not all(found.said)  # one clip has no audio

    def telling(batch: Any) -> Flows:
        words = ["good film", "", " a\nplot\t was\x1b"]
        said = [[*tokenizer(words[i % 3], add_special_tokens=False).input_ids, 1] for i in batch["index"].tolist()]
        width = max(map(len, said)) + 2
        ids = torch.tensor([row + [7] * (width - len(row)) for row in said])  # 7: behind the end, not said
        mask = torch.arange(width) < torch.tensor([len(row) for row in said])[:, None]
        return model(batch)._replace(answers=Tokens(ids, mask))

    assert run(made, tokenizer, telling).said == ["good film", "", "a plot was"] * 3
    assert run(recipe(shards), tokenizer).said == [""] * 9


@pytest.mark.parametrize("kind", ["mia", "cmpt"])
def test_what_is_imagined_of_the_shown_clips_is_kept(
    kind: str, shards: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooled text vector as the complete flow has it, as it comes into the missing flow, and as it is imagined."""
    monkeypatch.setattr(evaluate, "SHOWN_CLIPS", 6)
    made = recipe(
        shards,
        imagination={"kind": kind, "heads": 2},
        simulation={"rollout": "none" if kind == "cmpt" else "prefix"},
    )
    model, split = build(made, tokenizer), open_split(made, "test")
    collate = build_collator(made, tokenizer, model)
    kept = run(made, tokenizer, model).representations
    assert kept["stand_in"].shape == (6, 3, 16)
    pooled: list[Any] = []
    model.fusion.pooled_attention[1].register_forward_hook(lambda _, __, output: pooled.append(output))
    imagined: list[Any] = []
    if kind == "mia":
        model.fusion.pooled_imagination["text"].register_forward_hook(lambda _, __, output: imagined.append(output))
    for row in range(6):
        pooled.clear(), imagined.clear()  # type: ignore[func-returns-value]
        batch = collate([{**split[row], "real": True}])
        with torch.no_grad():
            inputs = model.streams(batch)
            model(batch)
            last = imagined[-1] if imagined else proxy(model, inputs, pooled[-1])
        expected = torch.stack([pooled[-2][0], pooled[-1][0], last[0]]).numpy()
        np.testing.assert_allclose(kept["stand_in"][row], expected, atol=1e-5)
        assert kept["lacks"][row] == (1 if split[row]["text"] is not None else -1)
    assert -1 in kept["lacks"] and 1 in kept["lacks"]


def proxy(model: Any, inputs: Inputs, otherwise: Any) -> Any:
    """Mean of the text's proxies in what a clip has."""
    fusion = model.fusion
    sequences = fusion.project(inputs.whole)
    proxies = fusion.cmpt(sequences, [stream.mask for stream in inputs.whole], inputs.available.heard)
    there = [states[:, 0] for name, states in proxies.items() if inputs.available.present[0, MODALITIES.index(name)]]
    return torch.stack(there).mean(0) if there else otherwise


def test_what_vgmr_thinks_of_the_shown_clips_is_kept(
    shards: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "SHOWN_CLIPS", 5)
    for changes, k in (({}, 2), ({"global_value": False, "channel_values": False}, 0)):
        made = recipe(shards, refine={"kind": "vgmr", "width": 8, **changes})
        model, split = build(made, tokenizer), open_split(made, "test")
        collate = build_collator(made, tokenizer, model)
        kept = run(made, tokenizer).representations
        for flow in ("complete", "missing"):
            assert kept[f"refine_{flow}"].shape == (5, 3, k + 1)
            for row in range(5):
                notes = model(collate([{**split[row], "real": True}])).notes
                assert kept[f"refine_{flow}"][row, :, :k] == pytest.approx(
                    notes[f"estimates/{flow}"][0].detach().numpy(), abs=1e-5
                )
                assert kept[f"refine_{flow}"][row, :, k] == pytest.approx(
                    notes[f"gate/{flow}"][0].detach().numpy(), abs=1e-5
                )
    assert not any("refine" in name for name in run(recipe(shards), tokenizer).representations)


def test_other_text_in_the_place_of_the_transcript(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A field of KEY.json is read as a transcript is; of a clip without it the text is absent."""
    rng = np.random.default_rng()
    clips = {f"k{i}": tiny.clip(rng) for i in range(5)}
    heard: dict[str, Any] = {"k0": "the film was awful", "k1": "", "k2": None, "k3": 7}
    splits: tuple[Split, ...] = ("train", "valid", "test")
    dims = Dims(audio="waveform", text=None, vision=tiny.VISION_WIDTH)
    with write_dataset(tmp_path / "shards", dims=dims, label_range=(-3.0, 3.0), samples_per_shard=8) as writer:
        for name, (key, sample) in itertools.product(splits, clips.items()):
            extra = {"asr": heard.get(key)}
            writer.add(name, pack_sample(key=f"{name}{key}", split=name, extra=extra, **sample))
    made = recipe(tmp_path / "shards")
    split = open_split(made, "test")
    gold = [split[i]["text"] for i in range(5)]
    split.text_field = "asr"
    assert [split[i]["text"] for i in (0, 1, 2, 4)] == ["the film was awful", None, None, None] and all(gold)
    with pytest.raises(UserError, match=r"sample testk3: has a asr that is no text"):
        split[3]
    split.on_bad_sample = "set_aside"
    model = build(made, tokenizer)
    found = predict(model, split, build_collator(made, tokenizer, model), batch=4, workers=0)
    assert found.present[:, 1].tolist() == [True, False, False, False] and len(found.set_aside) == 1
    said = model(build_collator(made, tokenizer, model)([{**split[0], "text": "the film was awful", "real": True}]))
    assert found.complete[0] == pytest.approx(said.complete.prediction.item(), abs=1e-5)


def test_clips_set_aside_are_told_and_left_out(shards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(shards, data={"on_bad_sample": "set_aside"}, audio={"max_seconds": 0.35})
    split = open_split(made, "test")
    long = {key for key, seconds in zip(split.keys, split.columns.audio_seconds, strict=True) if (seconds or 0) > 0.35}
    assert 0 < len(long) < 9
    found = run(made, tokenizer)
    assert set(found.keys) == set(split.keys) - long
    assert {text.split(":")[0] for text in found.set_aside} == long and len(found.set_aside) == len(long)
    with pytest.raises(UserErrors, match=r"sample test00\d: lasts .* audio\.max_seconds"):
        run(recipe(shards, audio={"max_seconds": 0.35}), tokenizer)


def test_a_split_of_which_nothing_is_left_is_an_error(shards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(shards)
    model = build(made, tokenizer)
    collate = build_collator(made, tokenizer, model)

    def none_real(samples: list[dict[str, Any]]) -> Any:
        return collate([{**sample, "real": False} for sample in samples])

    with pytest.raises(UserError, match="split test: has no clip"):
        predict(model, open_split(made, "test"), none_real, batch=4, workers=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("flow", ["complete", "missing"])
def test_predictions_that_are_not_finite_name_their_clips(
    flow: str, value: float, shards: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = recipe(shards)
    model = build(made, tokenizer)

    def broken(batch: Any) -> Flows:
        flows = model(batch)
        getattr(flows, flow).prediction[(batch["index"] == 2) | (batch["index"] == 7)] = value
        return flows

    with pytest.raises(UserError, match=r"split test: .* 2 of 9 clips is not finite: test002, test007\."):
        run(made, tokenizer, broken)


def test_scores_against_numpy() -> None:
    found = random_predictions()
    train = np.random.default_rng().uniform(-3, 3, 31)
    scores = score(found, train, TaskSettings())
    label = found.label.astype(float)
    for flow in ("complete", "missing"):
        predicted = getattr(found, flow).astype(float)
        assert scores[flow]["mae"] == pytest.approx(np.abs(predicted - label).mean())
        assert scores[flow]["corr"] == pytest.approx(np.corrcoef(predicted, label)[0, 1])
        away = label != 0
        assert scores[flow]["acc2_nonzero"] == pytest.approx(((predicted > 0) == (label > 0))[away].mean())
        assert scores[flow]["acc2_has0"] == pytest.approx(((predicted >= 0) == (label >= 0)).mean())
        seven = [np.clip(values, -3, 3).round() for values in (predicted, label)]
        assert scores[flow]["acc7"] == pytest.approx((seven[0] == seven[1]).mean())
    assert scores["floor"]["mae"] == pytest.approx(np.abs(np.median(train) - label).mean())
    assert scores["gap"]["mae"] == pytest.approx(scores["missing"]["mae"] - scores["complete"]["mae"])


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    found = random_predictions()
    write_predictions(tmp_path, "test", found)
    with (tmp_path / "predictions_test.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == found.keys
    assert list(rows[0]) == ["key", "label", "complete", "missing", "has_audio", "has_text", "has_vision", "imagined"]
    assert [row["imagined"] for row in rows] == found.said
    for name in ("label", "complete", "missing"):
        assert [float(row[name]) for row in rows] == pytest.approx(getattr(found, name).tolist(), rel=1e-5)
    present = [[row[f"has_{name}"] == "1" for name in ("audio", "text", "vision")] for row in rows]
    assert present == found.present.tolist()
    written = load_file(tmp_path / "representations_test.safetensors")
    assert written.keys() == {"complete", "missing", "label"}
    assert all(np.array_equal(written[name], found.representations[name]) for name in written)


def test_checkpoints_are_found_by_name_or_path(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    saved = run.checkpoints / "step_00000007"
    saved.mkdir(parents=True)
    (run.checkpoints / "best").symlink_to(saved.name)
    assert find_checkpoint(run, "best") == find_checkpoint(run, str(saved)) == saved.resolve()
    for name in ("last", "nothing"):
        with pytest.raises(UserError, match=f"{name}: is not a checkpoint"):
            find_checkpoint(run, name)


def test_a_checkpoint_of_another_frozen_base_is_refused(shards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(shards, audio={"tuning": "frozen"})
    model = build(made, tokenizer)
    bases = fingerprints(model)
    assert "audio" in bases
    check_bases(Path("checkpoint"), bases, bases)
    other = fingerprints(build(made.model_copy(update={"seed": 9}), tokenizer))
    with pytest.raises(UserErrors, match=r"checkpoint: was trained on other frozen weights of audio\.pretrained"):
        check_bases(Path("checkpoint"), bases, other)


def test_transcription_is_nats_per_token_of_all_clips(shards: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(shards, loss={"asr": 1.0}, training={"select_on": "transcription"})
    model, split = build(made, tokenizer), open_split(made, "test")
    collate = build_collator(made, tokenizer, model)
    whole = model(collate([{**split[index], "real": True} for index in range(len(split))])).asr
    assert whole is not None and (whole[:, 1] == 0).any()  # some clips lack audio or transcript
    scores = score(run(made, tokenizer), np.zeros(3), TaskSettings())
    assert scores["transcription"]["tokens"] == int(whole[:, 1].sum())
    expected = float(whole[:, 0].sum() / whole[:, 1].sum())
    assert scores["transcription"]["nats_per_token"] == pytest.approx(expected, rel=1e-4)
    assert judged(scores, "transcription", TaskSettings()) == scores["transcription"]["nats_per_token"]


def test_what_selects() -> None:
    scores: dict[str, dict[str, Any]] = {"complete": {"mae": 1.0}, "missing": {"mae": 2.0}}
    assert [judged(scores, flow, TaskSettings()) for flow in ("mean", "complete", "missing")] == [1.5, 1.0, 2.0]
    with pytest.raises(UserError, match="no clip with audio and transcript"):
        judged(scores, "transcription", TaskSettings())


def test_transcription_cannot_select_without_clips_that_are_spoken_and_written(tmp_path: Path) -> None:
    lacking = tiny.write_corpus(tmp_path / "shards", train=11, valid=1)  # that one has no transcript
    judged_by = {"loss": {"asr": 1.0}, "training": {"select_on": "transcription"}}
    with pytest.raises(UserError, match="no validation clip has both audio and transcript"):
        check_size(recipe(lacking, **judged_by))
    check_size(recipe(lacking))
