"""Classification: its figures against loops in float64, its losses against their definitions, and a training of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.fusion import prediction_errors
from dist_train.losses import rank_n_contrast
from dist_train.metrics import class_floors, class_metrics
from dist_train.recipe import write_recipe
from dist_train.task import TaskSettings, confusion
from sharding.errors import UserError, UserErrors
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, Split
from tests import tiny
from tests.end_to_end.commands import only_error, run

THREE = {"kind": "classification", "classes": ["negative", "neutral", "positive"], "thresholds": [-1.0, 1.0]}


def figures_by_hand(pairs: list[tuple[int, int]], classes: int) -> dict[str, float]:
    """Class by class, from counts."""
    f1: dict[int, float] = {}
    recall: dict[int, float] = {}
    for c in range(classes):
        hit = sum(p == y == c for p, y in pairs)
        said, true = sum(p == c for p, _ in pairs), sum(y == c for _, y in pairs)
        if said or true:
            f1[c] = 2 * hit / (said + true)
        if true:
            recall[c] = hit / true
    return {
        "accuracy": sum(p == y for p, y in pairs) / len(pairs),
        "macro_f1": sum(f1.values()) / len(f1),
        "weighted_f1": sum(f1[y] for _, y in pairs) / len(pairs),
        "uar": sum(recall.values()) / len(recall),
    }


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 5).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.tuples(*[st.integers(0, c - 1)] * 2), min_size=1, max_size=30))
    )
)
def test_figures_of_classes_equal_counting(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = drawn
    predicted, true = map(np.array, zip(*pairs, strict=True))
    assert class_metrics(predicted, true, classes) == pytest.approx(figures_by_hand(pairs, classes), abs=1e-6)
    table = confusion(predicted, true, classes)
    assert all(table[y, p] == pairs.count((p, y)) for y in range(classes) for p in range(classes))
    most = max(range(classes), key=[y for _, y in pairs].count)
    assert class_floors(true, true, classes) == pytest.approx(
        figures_by_hand([(most, y) for y in true], classes), abs=1e-6
    )


def test_errors_of_classes_are_cross_entropy() -> None:
    logits, labels = torch.randn(9, 4, dtype=torch.float64) * 3, torch.randint(4, (9,))
    expected = [
        math.log(sum(math.exp(z) for z in row)) - row[int(y)] for row, y in zip(logits.tolist(), labels, strict=True)
    ]
    found = prediction_errors(logits, labels.to(torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_contrast_of_classes_equals_its_definition() -> None:
    """One's own class against all others; another class against all that are no nearer, those of other classes."""
    features, labels = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,)).double()
    similarity = -torch.cdist(features, features) / 2.0
    terms = []
    for i in range(8):
        for k in set(range(8)) - {i}:
            same = labels[k] == labels[i]
            rivals = [j for j in range(8) if j != i and (same or labels[j] != labels[i])]
            terms.append(similarity[i, rivals].logsumexp(0) - similarity[i, k])
    expected = torch.stack(terms).mean()
    found = rank_n_contrast(features, labels, 2.0, nominal=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    renamed = rank_n_contrast(features, (labels + 1) % 3, 2.0, nominal=True)  # classes have no order
    torch.testing.assert_close(found, renamed)


def test_labels_that_are_no_class_are_named() -> None:
    task = TaskSettings(kind="classification", classes=["a", "b"])
    assert task.checked(np.array([0.0, 1.0]), ["x", "y"], "corpus").tolist() == [0, 1]
    with pytest.raises(UserErrors) as caught:
        task.checked(np.array([0.0, 2.0, -1.0, 0.5]), list("wxyz"), "corpus, split train")
    assert [error.where.rsplit(" ")[-1] for error in caught.value.errors] == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"task\.kind"):
        TaskSettings().fitted(["a", "b"], "corpus")
    with pytest.raises(UserError, match=r"task\.classes"):
        task.fitted(["b", "a"], "corpus")
    assert TaskSettings.model_validate(THREE).targets(np.array([-3, -1, 0, 1.5])).tolist() == [0, 1, 1, 2]


def test_labels_of_the_test_split_are_looked_at_before_training(tmp_path: Path) -> None:
    with write_dataset(
        tmp_path / "shards",
        dims=Dims(audio="waveform", text=None, vision=tiny.VISION_WIDTH),
        label_range=(-3.0, 3.0),
        samples_per_shard=9,
    ) as writer:
        splits: tuple[Split, ...] = ("train", "train", "train", "train", "valid", "test")
        for i, split in enumerate(splits):
            clip = {**tiny.clip(np.random.default_rng(i)), "label": 2.0 if split == "test" else float(i % 2)}
            writer.add(split, pack_sample(f"clip{i}", split=split, **clip))
    task = {"kind": "classification", "classes": ["low", "high"]}
    write_recipe(tiny.recipe(tmp_path / "shards", task=task, data={"batch": 2}), tmp_path / "recipe.yaml")
    done = run("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--ranks", "1")
    assert "split test, clip clip5: has the label 2, which is no class" in only_error(done.returncode, done.stderr)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_training_of_a_classifier_on_one_rank_and_two(tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "shards")
    write_recipe(tiny.recipe(corpus, task=THREE, refine={"kind": "vgmr", "dropout": 0.0}), tmp_path / "recipe.yaml")
    losses: list[list[float]] = []
    for ranks in (1, 2):
        output = tmp_path / f"run{ranks}"
        done = run("train", tmp_path / "recipe.yaml", "--output", output, "--ranks", str(ranks))
        assert done.returncode == 0, done.stderr[-2000:]
        rows: list[dict[str, Any]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "step"]
        losses.append([row["loss"] for row in steps])
        assert all(row["loss/ce_complete"] > 0 and "loss/mse_complete" not in row for row in steps)
        summary = json.loads((output / "summary.json").read_text())["test"]
        assert summary["complete"].keys() == {"accuracy", "macro_f1", "weighted_f1", "uar"}
        assert "mae" not in summary["missing"] and 0 < summary["floor"]["accuracy"] < 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    done = run("report", tmp_path / "run1", tmp_path / "run2")
    assert done.returncode == 0 and "MAE" not in done.stdout, done.stdout + done.stderr[-2000:]
