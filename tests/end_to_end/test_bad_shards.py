"""Bad manifests, files and shards as a user meets them: one line per problem, no traceback, nothing half-written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, load_dataset
from sharding.stream import ShardedSplit
from tests.corpus import forbidden_directory, small_disk
from tests.end_to_end.commands import INTERRUPTED, REFUSED, Refused, call, press_ctrl_c, started, wait_until


def write_manifest(folder: Path, rows: list[str], header: str = "key,audio,text,vision,label,split") -> Path:
    (folder / "manifest.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "manifest.csv"


@pytest.mark.parametrize(
    ("header", "rows", "expected"),
    [
        ("key,text", ["a,b"], ["has no column 'label'", "has no column 'split'"]),
        (
            "key,text,label,split",
            ["a,t,0,train", "a,t,0,train", "b,t,4,train", "c,t,nan,train", "d,t,sad,train", "e,t,0,dev"],
            ["label 4 is outside -3", "label 'nan'", "label 'sad'", "split 'dev'. Write 'valid'", "lines 2, 3"],
        ),
        ("key,text,label,split", [], ["has no rows"]),
        ("key,audio,label,split", ["a,gone.wav,0,train"], ["gone.wav is missing"]),
    ],
)  # fmt: skip
def test_manifests(header: str, rows: list[str], expected: list[str], tmp_path: Path, refused: Refused) -> None:
    found = refused("shards", "make", write_manifest(tmp_path, rows, header), tmp_path / "out")
    assert len(found) == len(expected)
    assert all(want in line and "manifest.csv" in line for want, line in zip(expected, found, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.csv"]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A manifest of good clips of all kinds (other rate, stereo) among bad ones."""
    rng = np.random.default_rng()
    noise = rng.uniform(-0.5, 0.5, 8000).astype(np.float32)
    nan_wave, nan_array = noise.copy(), np.zeros((3, 5), np.float32)
    nan_wave[7], nan_array[1, 2] = np.nan, np.nan
    for name, samples, rate in (
        ("good.wav", noise, 16000),
        ("rate.wav", noise, 44100),
        ("stereo.wav", np.stack([noise, noise], 1), 16000),
        ("empty.wav", noise[:0], 16000),
        ("nan.wav", nan_wave, 16000),
        ("cut.wav", noise, 16000),
    ):
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
    os.truncate(tmp_path / "cut.wav", 9000)
    arrays: dict[str, np.ndarray] = {
        "good": np.ones((3, 5)),
        "rank": np.ones(5),
        "wide": np.ones((3, 6)),
        "nan": nan_array,
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "pickle.npy", np.array([[{}]], dtype=object))
    good = [f"g{i},good.wav,fine,good.npy,1,{split}" for i, split in enumerate(("train",) * 6 + ("valid", "test"))]
    odd = ["rate,rate.wav,,,0,train", "stereo,stereo.wav,,,0,train"]
    audio = [f"{name},{name}.wav,,,0,train" for name in ("empty", "nan", "cut")]
    vision = [f"v{name},,,{name}.npy,0,train" for name in ("rank", "wide", "nan", "pickle")]
    return write_manifest(tmp_path, [*good, *odd, *audio, *vision])


BAD_FILES = {
    "empty": "empty.wav: is empty",
    "nan": "nan.wav: holds NaN",
    "cut": "cut.wav: is truncated",
    "vrank": "rank.npy: has rank 1",
    "vwide": "wide.npy: has width 6",
    "vnan": "nan.npy: holds NaN",
    "vpickle": "pickle.npy: holds pickled objects",
}


def test_bad_files(mixed: Path, refused: Refused) -> None:
    found = refused("shards", "make", mixed, mixed.parent / "out", "--workers", "1")
    assert len(found) == len(BAD_FILES)
    for (key, problem), line in zip(BAD_FILES.items(), found, strict=True):
        assert line.startswith(f"sample {key}, ") and problem in line and "set_aside" in line
    assert not list(mixed.parent.glob("*out*"))


def test_bad_files_set_aside(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = mixed.parent / "out"
    assert call("shards", "make", mixed, out, "--workers", "1", "--on-bad-sample", "set_aside") == 0
    printed = capsys.readouterr().out
    for said in ("1 audio files resampled to 16 kHz", "1 audio files averaged to mono", "7 samples set aside"):
        assert said in printed
    assert {aside.key for aside in load_dataset(out).info.set_aside} == set(BAD_FILES)
    split = ShardedSplit(out, "train")
    assert split.keys == ["g0", "g1", "g2", "g3", "g4", "g5", "rate", "stereo"]
    assert abs(len(split[6]["audio"]) - 8000 * 16 / 44.1) <= 1


def test_invalid_utf8(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "m.csv").write_bytes(b"key,text,label,split\na,sch\xf6n,0,train\n")
    (line,) = refused("shards", "make", tmp_path / "m.csv", tmp_path / "out")
    assert "m.csv:2" in line and "0xf6" in line and "UTF-8" in line


def test_places_that_cannot_be_written(tmp_path: Path, refused: Refused) -> None:
    manifest = write_manifest(tmp_path, [f"k{i},,{'x' * 3000},,0,train" for i in range(300)])
    (tmp_path / "there").mkdir()
    assert "there: exists" in refused("shards", "make", manifest, tmp_path / "there")[0]
    assert "there: exists" in refused("shards", "demo", tmp_path / "there")[0]
    assert "Not a directory" in refused("shards", "make", manifest, manifest / "out")[0]
    with forbidden_directory(tmp_path / "forbidden") as forbidden:
        assert "no write permission" in refused("shards", "make", manifest, forbidden / "out", "--workers", "1")[0]
    with small_disk(tmp_path / "disk", 200_000) as disk:
        assert "disk full" in refused("shards", "make", manifest, disk / "out", "--workers", "1")[0]
        assert not list(disk.iterdir())


def damage(corpus: Path, folder: Path, how: str) -> Path:
    """A copy of a shard directory, damaged."""
    if how == "no directory":
        return folder / "gone"
    copy = Path(shutil.copytree(corpus, folder / "copy"))
    if how == "truncated tar":
        os.truncate(copy / "train-000001.tar", 2000)
    elif how == "index of another":
        shutil.copy(copy / "train-000002.tar.index.json", copy / "train-000001.tar.index.json")
    elif how == "no shards":
        for path in copy.glob("*.tar"):
            path.unlink()
    elif how == "cut json":
        os.truncate(copy / "dataset.json", 50)
    return copy


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("no directory", ["gone: is not a shard directory"]),
        ("truncated tar", ["train-000001.tar: is truncated (2000 bytes"]),
        ("index of another", ["train-000001.tar.index.json: is the index of another tar (train-000002.tar"]),
        ("no shards", [".tar: is missing"] * 5),
        ("cut json", ["dataset.json: is damaged"]),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_damaged_shards(
    how: str, expected: list[str], command: str, corpus: Path, tmp_path: Path, refused: Refused
) -> None:
    found = refused("shards", command, damage(corpus, tmp_path, how))
    assert len(found) == len(expected)
    assert all(want in line for want, line in zip(expected, found, strict=True))


def test_features_of_very_different_scale_are_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng()
    for i in range(4):
        np.save(tmp_path / f"even{i}.npy", rng.normal(size=(9, 5)) * [0.5, 1, 2, 3, 4])
        np.save(tmp_path / f"odd{i}.npy", rng.normal(size=(9, 3)) * [1e-3, 1, 50])
    manifest = write_manifest(tmp_path, [f"k{i},odd{i}.npy,,even{i}.npy,0,train" for i in range(4)])
    assert call("shards", "make", manifest, tmp_path / "out", "--workers", "1") == 0
    printed = capsys.readouterr().out
    assert "columns of audio are of very different scale" in printed and "columns of vision" not in printed


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that take a while to read."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    with write_dataset(folder, dims=Dims(), label_range=(-3, 3), samples_per_shard=10**6) as writer:
        for i in range(40_000):
            writer.add("train", pack_sample(key=f"k{i}", label=0.0, split="train", text="t"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", ["make", "demo", "verify", "inspect"])
def test_ctrl_c(command: str, tmp_path: Path, many: Path) -> None:
    words: Any = {
        "make": [write_manifest(tmp_path, [f"k{i},,text,,0,train" for i in range(40_000)]), tmp_path / "out"],
        "demo": [tmp_path / "out", "--clips", "4000"],
        "verify": [many],
        "inspect": [many],
    }[command]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = set(tmp_path.iterdir())
    with started("shards", command, *words, TMPDIR=str(scratch)) as process:
        at_work: Any = {
            "make": lambda: list(tmp_path.glob(".out.partial-*/*.tar")),
            "demo": lambda: list(scratch.glob("*/audio/*.wav")),
            "verify": lambda: any(
                "train-000000.tar" in str(fd.resolve()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()
            ),
            "inspect": lambda: "libsndfile" in Path(f"/proc/{process.pid}/maps").read_text(),
        }[command]
        wait_until(at_work, process)
        # What was making shards says that nothing was kept.
        press_ctrl_c(process, (*INTERRUPTED, REFUSED) if command in ("make", "demo") else INTERRUPTED)
    assert set(tmp_path.iterdir()) == before and not list(scratch.iterdir())
