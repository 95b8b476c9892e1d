"""CMU-MultimodalSDK's computational sequences, as h5py writes them."""

import json
import os

import h5py
import numpy as np
import pytest

SET_ASIDE = ("--on-bad-sample", "set_aside")
FILES = {
    "CMU_MOSEI_Labels": "All Labels",
    "CMU_MOSEI_TimestampedWords": "words",
    "CMU_MOSEI_TimestampedWordVectors": "glove_vectors",
    "CMU_MOSEI_COVAREP": "COVAREP",
    "CMU_MOSEI_VisualOpenFace2": "OpenFace_2",
}
VIDEOS = ("-3g5yACwYnA", "a[b]", "0k2dBa", "zz")


def put(file, name, video, features, intervals):
    group = file.require_group(f"{name}/data").create_group(video)
    group["features"], group["intervals"] = features, intervals
    metadata = file.require_group(f"{name}/metadata")
    if "root name" not in metadata:
        metadata["root name"] = json.dumps(name)


@pytest.fixture
def corpus(importer):
    """Videos of 12 s with clips at 1 to 4 and 5 to 9 s; returns {(sequence, video): (features, intervals)}."""
    folder = importer.folder / "mosei"
    folder.mkdir()
    rng, held = importer.rng, {}
    for stem, name in FILES.items():
        with h5py.File(folder / f"{stem}.csd", "w") as file:
            for video in VIDEOS:
                if name == "All Labels":
                    features, intervals = rng.uniform(-3, 3, (2, 7)), np.array([[1.0, 4.0], [5.0, 9.0]])
                elif name == "words":
                    count = 12
                    features = np.array([[b"sp"] if i % 3 == 0 else [f"wört{i}".encode()] for i in range(count)], "S32")
                    intervals = np.arange(count)[:, None] + np.array([0.0, 1.0])
                else:
                    count = int(rng.integers(40, 60))
                    begin = np.sort(rng.uniform(0, 12, count))
                    features = rng.normal(size=(count, {"glove_vectors": 5, "COVAREP": 4, "OpenFace_2": 3}[name]))
                    intervals = np.stack([begin, begin + 0.1], 1)
                put(file, name, video, features, intervals)
                held[name, video] = features, intervals
    importer.source = folder
    importer.folds = importer.folder / "folds.json"
    importer.folds.write_text(json.dumps({"train": VIDEOS[:2], "val": [VIDEOS[2]], "test": ["gone"]}))
    return held


def cut(held, begin, end):
    features, intervals = held
    return np.array([row for row, (a, b) in zip(features, intervals, strict=True) if begin <= (a + b) / 2 < end])


def test_clips_are_cut_at_the_labels(importer, corpus):
    summary = importer.good("csd", importer.source, "--split-from", importer.folds, "--workers", 2)
    found = importer.samples()
    assert len(found) == 6
    for video in VIDEOS[:3]:
        labels, times = corpus["All Labels", video]
        for i, (begin, end) in enumerate(times):
            one = found[f"{video}[{i}]"]
            assert one["label"] == pytest.approx(labels[i, 0]) and one["split"] == (
                "valid" if video == "0k2dBa" else "train"
            )
            assert one["json"]["annotations"] == pytest.approx(labels[i]) and one["json"]["interval"] == [begin, end]
            for stream, name in {"audio": "COVAREP", "text_features": "glove_vectors", "vision": "OpenFace_2"}.items():
                assert np.array_equal(one[stream], cut(corpus[name, video], begin, end).astype(np.float32))
            words = cut(corpus["words", video], begin, end)[:, 0]
            assert one["text"] == " ".join(word.decode() for word in words if word != b"sp")
    assert {one["name"] for one in importer.record()["left_out"]} == {"zz[0]", "zz[1]", "gone"}
    assert "2 left out: not in" in summary and "audio: COVAREP of CMU_MOSEI_COVAREP.csd" in summary


def test_the_fold_file_of_the_sdk_is_read_not_run(importer, corpus):
    folds = importer.folder / "cmu_mosei_std_folds.py"
    text = f"import os\nos.system('touch {importer.folder}/ran')\nstandard_train_fold = {list(VIDEOS[:2])}\n"
    folds.write_text(text + f"standard_valid_fold={[VIDEOS[2]]}\nstandard_test_fold = {[VIDEOS[3]]}\n")
    importer.good("csd", importer.source, "--split-from", folds)
    assert len(importer.samples()) == 8 and not (importer.folder / "ran").exists()
    folds.write_text(text + "standard_test_fold = open('x').read()")
    assert "is no list of splits" in importer_errors(importer, folds)[0]
    table = importer.folder / "folds.csv"
    table.write_text("video,split\nzz,train\nzz,test\n0k2dBa,folds\n")
    assert "unknown split 'folds'" in importer_errors(importer, table)[0]
    table.write_text("video,split\nzz,train\nzz,test\n")
    assert "'zz' is in train and in test" in importer_errors(importer, table)[0]


def importer_errors(importer, folds):
    importer.out = importer.folder / "other"
    return importer.refused("csd", importer.source, "--split-from", folds)


def test_what_is_not_said_or_not_there(importer, corpus):
    assert "--split-from: is missing" in importer.refused("csd", importer.source)[0]
    options = ("--split-from", importer.folds)
    with h5py.File(importer.source / "facet.csd", "w") as file:
        put(file, "FACET 4.2", "zz", np.zeros((1, 2)), np.zeros((1, 2)))
    assert "2 sequences" in importer.refused("csd", importer.source, *options)[0]
    errors = importer.refused("csd", importer.source, *options, "--vision", "OpenFace", "--audio", "opensmile")
    assert len(errors) == 2 and "'opensmile' is not one" in errors[0]
    (importer.source / "CMU_MOSEI_Labels.csd").unlink()
    (importer.source / "noise.csd").write_bytes(importer.rng.bytes(500))
    errors = importer.refused("csd", importer.source, *options, "--vision", "facet")
    assert "noise.csd: cannot be read, damaged or truncated" in errors[0] and "--label: 0 sequences" in errors[1]


def test_damaged_and_hostile_sequences(importer, corpus):
    secret = importer.folder / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.zeros((3, 4))
    with h5py.File(importer.source / "CMU_MOSEI_COVAREP.csd", "a") as file:
        data = file["COVAREP/data"]
        del data["a[b]/features"], data["0k2dBa/intervals"]
        data["a[b]/features"] = h5py.ExternalLink(str(secret), "x")
        data["0k2dBa/intervals"] = np.zeros((3, 2))
        data["-3g5yACwYnA/features"][:] = -np.inf
    errors = importer.refused("csd", importer.source, "--split-from", importer.folds)
    assert len(errors) == 2 and "has features as a link" in "".join(errors) and "intervals [3, 2]" in "".join(errors)
    importer.good("csd", importer.source, "--split-from", importer.folds, *SET_ASIDE, "--fill-non-finite")
    assert importer.set_aside().keys() == {"a[b]", "0k2dBa"} and len(importer.record()["filled"]) == 2
    importer.out = importer.folder / "cut"
    os.truncate(importer.source / "CMU_MOSEI_VisualOpenFace2.csd", 3000)
    errors = importer.refused("csd", importer.source, "--split-from", importer.folds)
    assert any("damaged or truncated" in line for line in errors)


def test_empty_stretches_are_absent(importer, corpus):
    with h5py.File(importer.source / "CMU_MOSEI_COVAREP.csd", "a") as file:
        del file["COVAREP/data/zz"]
        intervals = file["COVAREP/data/-3g5yACwYnA/intervals"]
        intervals[:] = np.where(intervals[:] < 4.2, 4.2, intervals[:])
    importer.folds.write_text(json.dumps({"train": VIDEOS}))
    summary = importer.good("csd", importer.source, "--split-from", importer.folds)
    assert set(importer.record()["without"]["audio"]) == {"zz[0]", "zz[1]", "-3g5yACwYnA[0]"}
    assert "3 clips have no audio in the source" in summary
