"""What holds for all importers: options, missing packages, names that a shard cannot have."""

import json
import sys

import numpy as np
import pytest

from tests.tools.imports.test_mmsa import part, write


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--from", "mosei"), "--from: 'mosei' is not known"),
        (("--label", "x"), "--from: is missing"),
        (("--from", "mmsa", "--splits", "train:a"), "is no list of names and values"),
        (("--from", "mmsa", "--splits", "training=a"), "'training' is no split"),
        (("--from", "mmsa", "--splits", "train=a,test=a"), "gives one split two names"),
        (("--from", "meld", "--labels", "a=1,a=2"), "is no list of names and values"),
        (("--from", "meld", "--audio", "a", "--vision", "b"), "--vision: has no meaning with --from meld"),
        (("--from", "mmsa", "--label-range", 1, -1), "label range: 1.0 is not below -1.0"),
    ],
)
def test_unusable_options(importer, options, told):
    (importer.folder / "source").mkdir()
    assert told in "\n".join(importer.refused("", importer.folder / "source", *options))


def test_missing_packages_name_the_extra(importer, monkeypatch):
    for package in ("av", "h5py", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    folds = importer.folder / "folds.json"
    folds.write_text('{"train": ["a"]}')
    (importer.folder / "film.mp4").write_bytes(b"x")
    (importer.folder / "m.csv").write_text("key,audio,label,split\na,film.mp4,0,train\n")
    for kind, source, *options in (
        ("", importer.folder / "m.csv"),
        ("csd", importer.folder, "--split-from", folds),
        ("datasets", importer.folder),
    ):
        assert "pip install 'dist-train[import]'" in importer.refused(kind, source, *options)[0]


def test_names_that_a_shard_cannot_have(importer):
    held = part(importer.rng, "train", 5)[0]
    held["id"] = np.array(["a/b.mp4", "a_b_mp4", "ümläut", "\x1b[2J", ""])
    source = write(importer, {"train": held})
    errors = importer.refused("mmsa", source)
    assert len(errors) == 2 and "gets the key of 'a/b.mp4'" in errors[0] and "key is empty" in errors[1]
    importer.good("mmsa", source, "--on-bad-sample", "set_aside", "--workers", 2)
    assert importer.samples().keys() == {"a_b_mp4", "ümläut", "_[2J"}
    assert importer.record()["renamed"] == {"a_b_mp4": "a/b.mp4", "_[2J": "\x1b[2J"}
    assert importer.samples()["a_b_mp4"]["json"]["name"] == "a/b.mp4"


def test_annotations_that_fit_nowhere_are_kept(importer):
    held = part(importer.rng, "train", 2)[0]
    held |= {
        "speaker": ["Ann", None],
        "words": [["a", "b"], []],
        "noise": [float("nan"), 1],
        "big": importer.array(2, 999),
    }
    summary = importer.good("mmsa", write(importer, {"train": held}))
    assert "2 clips: annotation 'big' is too large" in summary
    found = {key: one["json"] for key, one in importer.samples().items()}
    first, second = (found[key] for key in held["id"])
    assert first["speaker"] == "Ann" and first["words"] == ["a", "b"] and first["noise"] == "nan"
    assert "speaker" not in second and second["noise"] == 1 and "big" not in first
    assert json.loads((importer.out / "import.json").read_text())["kind"] == "mmsa"
