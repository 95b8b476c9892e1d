"""Folders of Hugging Face datasets, as the library saves them."""

import io
import json

import datasets
import numpy as np
import pytest
import soundfile

from tests.tools.imports.films import write_film

SET_ASIDE = ("--on-bad-sample", "set_aside")
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "sentence": datasets.Value("string"),
        "valence": datasets.Value("float32"),
        "arousal": datasets.Value("float32"),
        "mood": datasets.ClassLabel(names=["sad", "glad"]),
        "faces": datasets.List(datasets.List(datasets.Value("float32"))),
        "mel": datasets.Array2D((4, 6), "float32"),
    }
)


def encoded(samples, kind="FLAC", rate=16000):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


@pytest.fixture
def corpus(importer):
    """Rows by split."""
    rows = {}
    for split, count in {"train": 4, "validation": 2, "test": 2}.items():
        rows[split] = [
            {
                "id": f"{split}/{i}.wav",
                "audio": {
                    "bytes": encoded(importer.rng.integers(-9000, 9000, 3000).astype(np.int16)),
                    "path": f"{i}.flac",
                },
                "sentence": f"Sätze {i}",
                "valence": float(np.float32(importer.rng.uniform(-3, 3))),
                "arousal": 0.5,
                "mood": i % 2,
                "faces": importer.array(int(importer.rng.integers(1, 5)), 3).tolist(),
                "mel": importer.array(4, 6).tolist(),
            }
            for i in range(count)
        ]
    return rows


def dataset(rows, kind=None):
    """Rows as a dataset; encoding sounds would need torchcodec, so their column gets its type afterwards."""
    return datasets.Dataset.from_list(rows, features=FEATURES).cast_column("audio", kind or datasets.Audio())


def save(importer, rows, name="set"):
    datasets.DatasetDict({split: dataset(part) for split, part in rows.items()}).save_to_disk(importer.folder / name)
    return importer.folder / name


def test_columns_are_found_by_type(importer, corpus):
    source = save(importer, corpus)
    assert "has no column that is plainly the label" not in importer.good("datasets", source, "--vision", "faces")
    found = importer.samples()
    assert len(found) == 8
    for split, rows in corpus.items():
        for row in rows:
            one = found[row["id"].replace("/", "_").replace(".", "_")]
            pcm = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0]
            assert np.array_equal(one["audio"], pcm) and one["text"] == row["sentence"]
            assert np.array_equal(one["vision"], np.array(row["faces"], np.float32))
            assert one["label"] == row["valence"] and one["split"] == split.removesuffix("ation")
            assert (
                one["json"]["arousal"] == 0.5
                and one["json"]["mood"] == row["mood"]
                and one["json"]["name"] == row["id"]
            )
    assert any("columns left out: mel" in line for line in importer.record()["remarks"])


def test_features_classes_and_other_splits(importer, corpus):
    source = save(importer, {"a.clean": corpus["train"], "b": corpus["test"]})
    assert "--splits train=NAME" in importer.refused("datasets", source)[0]
    options = ("--splits", "train=a.clean", "--audio", "mel", "--label", "mood")
    assert "holds classes (glad, sad)" in importer.refused("datasets", source, *options)[0]
    importer.good("datasets", source, *options, "--labels", "sad=-1,glad=1")
    found = importer.samples()
    assert len(found) == 4 and importer.record()["left_out"] == [{"name": "b", "reason": "no split"}]
    for row in corpus["train"]:
        one = found[row["id"].replace("/", "_").replace(".", "_")]
        assert one["label"] == (-1, 1)[row["mood"]]
        assert np.array_equal(one["audio"], np.array(row["mel"], np.float32))


def test_a_single_dataset_needs_a_split_file(importer, corpus):
    dataset(corpus["train"]).save_to_disk(importer.folder / "one")
    assert "Give --split-from FILE" in importer.refused("datasets", importer.folder / "one")[0]
    folds = importer.folder / "folds.json"
    folds.write_text(json.dumps({"train": ["train/0.wav"], "test": ["train/1.wav", "train/2.wav"]}))
    summary = importer.good("datasets", importer.folder / "one", "--split-from", folds)
    assert [one["split"] for one in importer.samples().values()] == ["train", "test", "test"]
    assert "1 left out: not in" in summary


def test_bad_rows_are_named(importer, corpus):
    rows = corpus["train"]
    rows[0]["audio"]["bytes"] = importer.rng.bytes(3000)
    wav = encoded(np.zeros(30000), "WAV")
    rows[1]["audio"]["bytes"] = wav[:10000]
    rows[2] |= {"valence": float("nan")}
    rows[3] |= {"id": "train/0.wav"}
    corpus["test"][0] |= {"audio": None, "faces": None}
    corpus["test"][1]["faces"][0][0] = float("inf")
    source = save(importer, corpus)
    errors = importer.refused("datasets", source, "--vision", "faces")
    assert len(errors) == 2 and "label nan is not a number" in errors[0] and "stands twice" in errors[1]
    importer.good("datasets", source, "--vision", "faces", *SET_ASIDE)
    aside = importer.set_aside()
    assert aside.keys() == {"train_0_wav", "train_1_wav", "train_2_wav", "test_1_wav"}
    assert "is truncated" in aside["train_1_wav"] and "NaN or infinite" in aside["test_1_wav"]
    assert importer.record()["without"] == {"audio": ["test_0_wav"], "vision": ["test_0_wav"]}


def test_films_in_a_column(importer, corpus):
    for i, row in enumerate(corpus["train"]):
        path = importer.folder / f"{i}.mkv"
        write_film(path, importer.rng.integers(-9000, 9000, (1, 16000)).astype(np.int16), 16000)
        row["audio"] = {"bytes": path.read_bytes(), "path": path.name}
        path.unlink()
    datasets.DatasetDict({"train": dataset(corpus["train"], datasets.Video())}).save_to_disk(importer.folder / "films")
    summary = importer.good("datasets", importer.folder / "films")
    assert "4 clips are films" in summary and all(len(one["audio"]) == 16000 for one in importer.samples().values())


def test_folders_that_are_none(importer, corpus):
    source = save(importer, corpus)
    script = importer.folder / "script"
    script.mkdir()
    (script / "script.py").write_text(f"open({str(importer.folder / 'ran')!r}, 'w')")
    assert "cannot be loaded" in importer.refused("datasets", script)[0]
    assert not (importer.folder / "ran").exists()
    assert "has no column 'sound'" in importer.refused("datasets", source, "--audio", "sound")[0]
    arrow = next((source / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert "cannot be loaded" in importer.refused("datasets", source)[0]
    (source / "dataset_dict.json").write_text('{"splits": ["../../x"]}')
    assert "cannot be loaded" in importer.refused("datasets", source)[0]
    assert "is missing" in importer.refused("datasets", importer.folder / "gone")[0]
    assert "Did you mean datasets?" in importer.refused("dataset", source)[0]
