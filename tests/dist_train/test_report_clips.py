"""The clips of the report: chosen by the stated rules, shown as the shards have them, whatever became of the shards."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from dist_train import clip_media, figures
from dist_train.clip_choice import apart_and_wrong, choose
from dist_train.report import write_report
from dist_train.run_record import read_run
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims

HOSTILE = "<script>alert(1)</script> \"><img src='x' onerror=1> $\\frac{$ & \u202e &lt;"
RATE = 16000


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the page, not about its figures."""
    monkeypatch.setattr(figures, "render", lambda draw: b"png")


def write_clips(root: Path, rng: np.random.Generator, clips: int = 6, **texts: str) -> dict[str, dict[str, Any]]:
    """A test split of short clips, the first of 12 s, the second without audio, the third without transcript."""
    made: dict[str, dict[str, Any]] = {}
    with write_dataset(root, dims=Dims(audio="waveform"), label_range=(-3.0, 3.0), samples_per_shard=4) as writer:
        for number in range(clips):
            key = f"clip {number} <b>$" if number == 3 else f"clip{number}"
            samples = 12 * RATE if number == 0 else int(rng.integers(1000, 5000))
            clip: dict[str, Any] = {
                "label": round(float(rng.uniform(-3, 3)), 3),
                "audio": None if number == 1 else rng.uniform(-0.9, 0.9, samples).astype(np.float32),
                "text": None if number == 2 else texts.get(f"text{number}", f"the words of {number} é"),
            }
            made[key] = clip
            writer.add("test", pack_sample(key=key, split="test", **clip))
    return made


def write_run(path: Path, data: Any, clips: dict[str, dict[str, Any]], rng: np.random.Generator) -> list[list[str]]:
    """A run directory with predictions of these clips, and its rows."""
    path.mkdir()
    (path / "recipe.yaml").write_text(json.dumps({"data": data}))
    rows = [
        [key, f"{clip['label']:.6g}", *(f"{value:.6g}" for value in rng.uniform(-3, 3, 2)), *"110", f"dreamt {key}"]
        for key, clip in clips.items()
    ]
    with (path / "predictions_test.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["key", "label", "complete", "missing", "has_audio", "has_text", "has_vision", "imagined"])
        table.writerows(rows)
    return rows


def page_of(run: Path) -> tuple[str, dict[str, str]]:
    """The page, and its cards by key."""
    text = write_report(run).read_text(encoding="utf-8")
    assert "</html>" in text and not re.search(r"<script|<img src='x|onerror=1>", text)
    for address in re.findall(r"""(?:src|srcset|href)\s*=\s*["']([^"']*)|url\(([^)]*)""", text):
        assert re.match(r"data:(image/png|audio/wav);base64,", "".join(address)), address
    cards = re.findall(r"<article.*?</article>", text, re.DOTALL)
    return text, {html.unescape(re.findall(r"<h3[^>]*>(.*?)</h3>", card)[0]): card for card in cards}


def test_each_clip_is_shown_as_the_shards_have_it(tmp_path: Path, rng: np.random.Generator) -> None:
    clips = write_clips(tmp_path / "shards", rng, text4=HOSTILE, text5="so long " * 9999)
    rows = write_run(tmp_path / "run", {"path": str(tmp_path / "shards")}, clips, rng)
    text, cards = page_of(tmp_path / "run")
    assert cards.keys() == clips.keys()
    for key, label, complete, missing, *_, imagined in rows:
        card, clip = cards[key], clips[key]
        assert html.escape(imagined, quote=False) in card and "audio, text</p>" in card.replace(" · ", "</p>")
        for value in (complete, missing):
            signed = f"{float(value):+.2f}", f"{float(value) - float(label):+.2f}"
            assert all(
                one.replace("-", "−").replace("+0.00", "0.00").replace("−0.00", "0.00") in card for one in signed
            )
        said = re.findall(r"said</p><blockquote[^>]*>(.*?)</blockquote>", card)
        assert len(said) == (clip["text"] is not None)
        if clip["text"] is not None and len(clip["text"]) < 800:
            assert html.unescape(said[0]) == clip["text"]
        sounds = re.findall(r'<audio controls preload="none" src="data:audio/wav;base64,([^"]*)"></audio>', card)
        assert len(sounds) == (clip["audio"] is not None)
        for sound in sounds:
            file = base64.b64decode(sound, validate=True)
            heard, rate = soundfile.read(io.BytesIO(file))
            assert rate == RATE and len(file) <= 400_000
            np.testing.assert_allclose(heard, clip["audio"][: 10 * RATE], atol=2e-4)
    assert "first 10 s of 12.0 s" in cards["clip0"] and "first 10 s" not in cards["clip4"]
    assert "… (79,992 characters)" in cards["clip5"] and len(text) < 2_000_000


def test_clips_of_a_mix_are_found_by_name(tmp_path: Path, rng: np.random.Generator) -> None:
    found = {name: write_clips(tmp_path / name, rng, 2) for name in ("here", "there")}
    clips = {f"{name}/{key}": clip for name, part in found.items() for key, clip in part.items()}
    sources = [{"path": str(tmp_path / "here"), "weight": 2.0}, {"path": str(tmp_path / "there"), "name": None}]
    write_run(tmp_path / "run", {"path": None, "sources": sources}, clips, rng)
    _, cards = page_of(tmp_path / "run")
    assert sorted(key for key, card in cards.items() if "<audio" in card) == ["here/clip0", "there/clip0"]


@pytest.mark.parametrize("draw", range(10))
def test_the_rules_choose_what_they_say(rng: np.random.Generator, draw: int) -> None:
    n = int(rng.integers(8, 60))
    label = rng.integers(-3, 4, n).astype(float)
    flows = {flow: rng.integers(-6, 7, n) / 2 for flow in ("complete", "missing")}  # many ties
    keys = [f"k{number:03d}" for number in rng.permutation(n)]
    predicted = np.stack(list(flows.values()))
    chosen = choose(label, predicted, keys)
    rules = [rule for _, rule in chosen]
    assert rules == ["apart"] * 3 + ["wrong"] * 3 + ["typical"] * 2
    errors = [[abs(flows[flow][row] - label[row]) for flow in flows] for row in range(n)]
    middle = float(np.median([sum(pair) / 2 for pair in errors]))
    worth = {
        "apart": [abs(flows["complete"][row] - flows["missing"][row]) for row in range(n)],
        "wrong": [max(pair) for pair in errors],
        "typical": [-abs(sum(pair) / 2 - middle) for pair in errors],
    }
    left = set(range(n))
    for row, rule in chosen:  # each is the best of those that are left
        best = max(worth[rule][other] for other in left)
        assert keys[row] == min(keys[other] for other in left if worth[rule][other] == best)
        left.remove(row)
    order = rng.permutation(n)
    again = choose(label[order], predicted[:, order], [keys[row] for row in order])
    assert [keys[row] for row, _ in chosen] == [keys[order[row]] for row, _ in again]
    assert len(choose(label[:3], predicted[:, :3], keys[:3])) == 3


def test_classes_are_apart_and_wrong_by_their_probabilities(rng: np.random.Generator) -> None:
    chances = rng.dirichlet(np.ones(4), (2, 9))  # [flow, clip, class]
    label = rng.integers(0, 4, 9)
    apart, wrong = apart_and_wrong(label, chances)
    for row in range(9):
        pairs = zip(chances[0, row], chances[1, row], strict=True)
        assert apart[row] == pytest.approx(sum(abs(a - b) for a, b in pairs) / 2)
        for flow in (0, 1):
            assert wrong[flow, row] == pytest.approx(
                sum(chances[flow, row, other] for other in range(4) if other != label[row])
            )


def flip(root: Path) -> None:
    """One bit of the sound of the first clip."""
    with (root / "test-000000.tar").open("r+b") as file:
        file.seek(10_000)
        byte = file.read(1)[0]
        file.seek(10_000)
        file.write(bytes([byte ^ 1]))


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for path in root.glob(name):
            path.write_bytes(content)

    return act


def terabyte(root: Path) -> None:
    for path in root.glob("*.tar"):
        os.truncate(path, 1 << 40)


def pipes(root: Path) -> None:
    for path in root.glob("*.tar"):
        path.unlink()
        os.mkfifo(path)


def forge_table(root: Path) -> None:
    """An index that says of every clip that it has a terabyte."""
    (root / "test.columns.safetensors").unlink()
    for path in root.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["columns"]["size"] = [1 << 40 for _ in index["columns"]["size"]]
        path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "is not a shard directory"),
        (replace("dataset.json", b"\0" * 9), "is damaged"),
        (replace("dataset.json", b"[" * 100_000), "is damaged"),
        (replace("*.tar", b"short"), "is truncated"),
        (replace("*.tar.index.json", b"{}"), "format"),
        (terabyte, "is not the tar of its index"),
        (pipes, "is missing"),
        (forge_table, "is damaged"),
    ],
)
def test_damaged_shards_leave_the_predictions(
    tmp_path: Path, rng: np.random.Generator, damage: Callable[[Path], None], said: str
) -> None:
    clips = write_clips(tmp_path / "shards", rng)
    rows = write_run(tmp_path / "run", {"path": str(tmp_path / "shards")}, clips, rng)
    damage(tmp_path / "shards")
    text, cards = page_of(tmp_path / "run")
    assert "Neither sound nor transcripts can be shown" in text and said in text and "<audio" not in text
    assert cards.keys() == clips.keys() and all(f"dreamt {html.escape(row[0])}" in text for row in rows)


def test_one_damaged_clip_and_one_of_another_label_are_told_and_the_others_shown(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    clips = write_clips(tmp_path / "shards", rng)
    clips["clip4"]["label"] += 0.5
    write_run(tmp_path / "run", {"path": str(tmp_path / "shards")}, clips | {"gone": {"label": 1.0}}, rng)
    flip(tmp_path / "shards")
    _, cards = page_of(tmp_path / "run")
    assert "bytes differ from the checksum" in cards["clip0"] and "<audio" not in cards["clip0"]
    assert "now has another clip clip4" in cards["clip4"] and "words of 4" not in cards["clip4"]
    assert "has no clip gone any more" in cards["gone"]
    assert "<audio" in cards["clip5"] and "can be shown" not in cards["clip5"]


def test_a_clip_too_large_to_be_one_is_not_read(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = write_clips(tmp_path / "shards", rng)
    write_run(tmp_path / "run", {"path": str(tmp_path / "shards")}, clips, rng)
    monkeypatch.setattr(clip_media, "MOST_SAMPLE", 200_000)
    _, cards = page_of(tmp_path / "run")
    assert [key for key, card in cards.items() if "at most 200000 are read" in card] == ["clip0"]
    assert "<audio" not in cards["clip0"] and "<audio" in cards["clip4"]


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [],
        {},
        {"path": 3},
        {"path": "\0"},
        {"path": "/dev"},
        {"sources": "x"},
        {"sources": [1, {"path": "\0"}]},
    ],
)
def test_a_recipe_that_names_no_data_is_no_error(tmp_path: Path, rng: np.random.Generator, data: Any) -> None:
    write_run(tmp_path / "run", data, {HOSTILE.replace("/", ""): {"label": 0.0}, "other": {"label": 1.0}}, rng)
    text, cards = page_of(tmp_path / "run")
    assert len(cards) == 2 and "Neither sound nor transcripts can be shown" in text
    assert "&lt;script&gt;" in text


def test_predictions_of_an_older_version_have_no_imagined_text(tmp_path: Path, rng: np.random.Generator) -> None:
    run = tmp_path / "run"
    write_run(run, {}, {"one": {"label": 1.0}, "two": {"label": 2.0}}, rng)
    rows = list(csv.reader((run / "predictions_test.csv").open(newline="")))
    with (run / "predictions_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(row[:-1] for row in rows)
    found = read_run(run).predictions
    assert found is not None and found.keys == ["one", "two"] and found.imagined == ["", ""]
    assert found.present == [["audio", "text"]] * 2
    text, cards = page_of(run)
    assert "No imagined text was kept" in text and "imagined</p>" not in text and len(cards) == 2
