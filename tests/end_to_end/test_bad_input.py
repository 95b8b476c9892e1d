"""Bad input as a user meets it: exit code 2, one line per problem on stderr, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from dist_train.cli import main
from dist_train.recipe import write_recipe
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, Split, load_dataset
from sharding.stream import ShardedSplit
from tests import tiny
from tests.corpus import forbidden_directory, small_disk

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes/quickstart.yaml"
REFUSED = 2
Refused = Callable[..., list[str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command in this process; returns its error lines."""

    def call(*words: str | Path) -> list[str]:
        with pytest.raises(SystemExit) as ended:
            main(args=list(map(str, words)), prog_name="dist-train")
        printed = capsys.readouterr().err
        assert ended.value.code == REFUSED and "Traceback" not in printed
        return errors(printed) or [" ".join(printed.replace("│", " ").split())]  # options are checked by typer

    return call


def errors(printed: str) -> list[str]:
    """What follows `error: ` on the lines of stderr."""
    return [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]


def run(*words: str | Path, limit: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, which must end by itself within `limit` seconds."""
    command = [sys.executable, "-m", "dist_train.cli", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=limit, check=False, env={**os.environ, **variables}
    )


def only_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a refused command."""
    assert done.returncode == REFUSED and "Traceback" not in done.stderr, done.stderr
    (line,) = errors(done.stderr)
    return line


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("bad") / "shards")


@pytest.fixture(scope="module")
def recipe(corpus: Path) -> Path:
    write_recipe(tiny.recipe(corpus), corpus.parent / "recipe.yaml")
    return corpus.parent / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    output = recipe.parent / "finished"
    done = run("train", recipe, "--output", output, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    return output


# ---- manifests and shards


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
    with pytest.raises(SystemExit) as ended:
        main(args=["shards", "make", str(mixed), str(out), "--workers", "1", "--on-bad-sample", "set_aside"])
    printed = capsys.readouterr().out
    assert ended.value.code in (0, None)
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


def test_places_that_cannot_be_written(tmp_path: Path, recipe: Path, corpus: Path, refused: Refused) -> None:
    manifest = write_manifest(tmp_path, [f"k{i},,{'x' * 3000},,0,train" for i in range(300)])
    (tmp_path / "there").mkdir()
    assert "there: exists" in refused("shards", "make", manifest, tmp_path / "there")[0]
    assert "there: exists" in refused("shards", "demo", tmp_path / "there")[0]
    assert "shards: exists already" in refused("train", recipe, "--output", corpus)[0]
    assert "Not a directory" in refused("shards", "make", manifest, manifest / "out")[0]
    assert "Not a directory" in refused("train", recipe, "--output", recipe / "out")[0]
    with forbidden_directory(tmp_path / "forbidden") as forbidden:
        assert "no write permission" in refused("shards", "make", manifest, forbidden / "out", "--workers", "1")[0]
        assert "cannot be made" in refused("train", recipe, "--output", forbidden / "run")[0]
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
    with pytest.raises(SystemExit):
        main(args=["shards", "make", str(manifest), str(tmp_path / "out"), "--workers", "1"])
    printed = capsys.readouterr().out
    assert "columns of audio are of very different scale" in printed and "columns of vision" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("command", ["make", "demo", "verify"])
def test_ctrl_c(command: str, tmp_path: Path, corpus: Path) -> None:
    words: Any = {
        "make": [write_manifest(tmp_path, [f"k{i},,text,,0,train" for i in range(40_000)]), tmp_path / "out"],
        "demo": [tmp_path / "out", "--clips", "4000"],
        "verify": [tmp_path / "many"],
    }[command]
    if command == "verify":
        with write_dataset(tmp_path / "many", dims=Dims(), label_range=(-3, 3), samples_per_shard=10**6) as writer:
            for i in range(40_000):
                writer.add("train", pack_sample(key=f"k{i}", label=0.0, split="train", text="t"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = set(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_train.cli", "shards", command, *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
        # Where the tests run in the background, SIGINT is ignored and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    started: Any = {
        "make": lambda: list(tmp_path.glob(".out.partial-*/*.tar")),
        "demo": lambda: list(scratch.glob("*/audio/*.wav")),
        "verify": lambda: [
            fd for fd in Path(f"/proc/{process.pid}/fd").iterdir() if "train-000000.tar" in str(fd.resolve())
        ],
    }[command]
    deadline = time.monotonic() + 60
    while not started() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal sends it
    printed = process.communicate(timeout=60)[1].decode()
    assert process.returncode in (REFUSED, 130) and "Traceback" not in printed, printed
    assert set(tmp_path.iterdir()) == before and not list(scratch.iterdir())


# ---- recipes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["training.epoch=3", "optimiser.name=x"], ["training.epochs?", "optimiser: is not a key"]),
        (["training.epochs=1.5", "data.batch=1"], ["training.epochs", "data.batch"]),
        (["data.on_bad_sample=skip"], ["data.on_bad_sample"]),
        (["seed"], ["seed"]),
        (["=3"], ["=3"]),
        (["seed=[1"], ["seed=[1"]),
        (["seed.x=3"], ["seed"]),
        (["data.path=${nope}"], ["nope"]),
        (["text.config.hidden_size=63"], ["text.config"]),
    ],
)
def test_overrides(words: list[str], expected: list[str], refused: Refused) -> None:
    found = sorted(refused("recipe", QUICKSTART, *words))
    assert len(found) == len(expected)
    assert all(any(want in line for line in found) for want in expected)


@pytest.mark.parametrize(
    "content", [b"{a: [1,", b"- 1\n- 2\n", b"seed: \xff\xfe", b"seed: 1\nseed: 2\n", b"a: &a [*a]\n"]
)
def test_files_that_are_no_recipe(content: bytes, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    (line,) = refused("recipe", tmp_path / "r.yaml")
    assert "r.yaml" in line


def test_recipes_that_are_not_there(tmp_path: Path, refused: Refused) -> None:
    for path in (tmp_path / "gone.yaml", tmp_path):
        (line,) = refused("recipe", path)
        assert str(path) in line and "cannot be read" in line


# ---- runs


def test_not_a_run(tmp_path: Path, recipe: Path, refused: Refused) -> None:
    for path in (tmp_path, tmp_path / "gone", recipe):
        assert "is not a run directory" in refused("evaluate", path)[0]
        assert str(path) in refused("report", path)[0]
        assert "is not a run directory" in refused("train", recipe, "--output", path, "--resume")[0]


def test_no_ranks(recipe: Path, tmp_path: Path, refused: Refused) -> None:
    assert "--ranks" in refused("train", recipe, "--output", tmp_path / "run", "--ranks", "0")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK"),
    ],
)
def test_environments_no_launcher_makes(variables: dict[str, str], named: str, recipe: Path, tmp_path: Path) -> None:
    assert named in only_error(run("train", recipe, "--output", tmp_path / "run", limit=30, **variables))
    assert not (tmp_path / "run").exists()


def corrupt_sample(corpus: Path, folder: Path) -> tuple[Path, str]:
    """A copy with one flipped byte in a training sample, and that sample's key."""
    copy = Path(shutil.copytree(corpus, folder / "corrupt"))
    index = load_dataset(copy).indexes["train"][1]
    data = bytearray((copy / index.tar).read_bytes())
    data[index.columns.offset[3] + 700] ^= 255
    (copy / index.tar).write_bytes(data)
    return copy, index.columns.key[3]


def test_corrupt_sample_stops_training(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    data, key = corrupt_sample(corpus, tmp_path)
    done = run("train", recipe, f"data.path={data}", "--output", tmp_path / "run", "--ranks", "2")
    line = only_error(done)
    assert f"sample {key}" in line and "train-000001.tar" in line and "checksum" in line
    assert not (tmp_path / "run/summary.json").exists()


def long_corpus(folder: Path) -> Path:
    """Two of 13 training clips and one validation clip have 10,000 words."""
    rng = np.random.default_rng(1)
    dims = Dims(audio="waveform", vision=tiny.VISION_WIDTH)
    with write_dataset(folder / "long", dims=dims, label_range=(-3, 3), samples_per_shard=8) as writer:
        plan: list[tuple[Split, int, tuple[int, ...]]] = [("train", 13, (3, 4)), ("valid", 4, (1,)), ("test", 4, ())]
        for split, count, long in plan:
            for i in range(count):
                clip = tiny.clip(rng) | ({"text": "film " * 10_000} if i in long else {})
                writer.add(split, pack_sample(key=f"{split}{i:03d}", split=split, **clip))
    return folder / "long"


def test_bad_clips_are_set_aside_and_counted_over_all_ranks(recipe: Path, tmp_path: Path) -> None:
    data, key = corrupt_sample(long_corpus(tmp_path), tmp_path)
    changes = [f"data.path={data}", "data.on_bad_sample=set_aside", "training.epochs=2", "data.workers=1"]
    done = run("train", recipe, *changes, "--output", tmp_path / "run", "--ranks", "2")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["set_aside"] == 3  # of training, each once although seen in two epochs
    assert all(name in " ".join(summary["notes"]) for name in (key, "train003", "train004"))
    (aside,) = summary["valid"]["set_aside"]
    assert "valid001" in aside and "tokens" in aside and summary["valid"]["clips"] == 3


@pytest.mark.slow
def test_long_text_stops_training(recipe: Path, tmp_path: Path) -> None:
    data = long_corpus(tmp_path)
    line = only_error(run("train", recipe, f"data.path={data}", "--output", tmp_path / "run", "--ranks", "2"))
    assert "sample train00" in line and "tokens" in line and "text.max_tokens" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "ranks", "expected"),
    [
        (["recipe=gone"], 1, "cannot be read"),
        (["training.epoch=3"], 2, "training.epochs?"),
        (["data.path=/nowhere"], 2, "/nowhere: is not a shard directory"),
        (["data.path=few"], 2, "has 1 training clips for 2 ranks"),
        (["data.path=novalid"], 1, "has no split 'valid'"),
        (["data.batch=2"], 3, "data.batch"),
    ],
)
def test_what_cannot_be_trained(changes: list[str], ranks: int, expected: str, recipe: Path, tmp_path: Path) -> None:
    tiny.write_corpus(tmp_path / "few", train=1, valid=2, test=2)
    tiny.write_corpus(tmp_path / "novalid", valid=0)
    before = set(tmp_path.iterdir())
    file = tmp_path / "gone.yaml" if changes == ["recipe=gone"] else recipe
    words = [] if changes == ["recipe=gone"] else [c.replace("=few", f"={tmp_path}/few") for c in changes]
    words = [word.replace("=novalid", f"={tmp_path}/novalid") for word in words]
    line = only_error(run("train", file, *words, "--output", tmp_path / "new/run", "--ranks", str(ranks)))
    assert expected in line
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_resume_with_another_recipe_names_the_differences(recipe: Path, finished: Path) -> None:
    changes = ["optimizer.learning_rate=2e-3", "seed=4"]
    done = run("train", recipe, *changes, "--output", finished, "--ranks", "2", "--resume")
    assert done.returncode == REFUSED and "Traceback" not in done.stderr
    assert [line.split(":")[0] for line in errors(done.stderr)] == ["optimizer.learning_rate", "seed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated weights", "model.safetensors: is missing or damaged"),
        ("no manifest", "is not a complete checkpoint"),
        ("empty manifest", "is not a complete checkpoint"),
        ("no checkpoints", "is not a checkpoint"),
        ("no tokenizer", "tokenizer"),
        ("unknown split", "has no split 'dev'"),
    ],
)
def test_evaluating_a_damaged_run(how: str, expected: str, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))
    best = copy / "checkpoints/best"
    if how == "truncated weights":
        os.truncate(best / "model.safetensors", 1000)
    elif how == "no manifest":
        (best / "manifest.json").unlink()
    elif how == "empty manifest":
        (best / "manifest.json").write_text("{}")
    elif how in ("no checkpoints", "no tokenizer"):
        shutil.rmtree(copy / how.removeprefix("no "))
    words = ["--split", "dev"] if how == "unknown split" else []
    line = only_error(run("evaluate", copy, "--ranks", "1", *words))
    assert expected in line and str(copy if how != "unknown split" else "shards") in line


@pytest.mark.slow
def test_full_disk_while_saving_then_resume(recipe: Path, tmp_path: Path) -> None:
    """Room for one checkpoint; later for more."""
    epochs = "training.epochs=3"
    with small_disk(tmp_path / "disk", 3_000_000) as disk:
        line = only_error(run("train", recipe, epochs, "--output", disk / "run", "--ranks", "2"))
        assert "step_00000008" in line and "No space left" in line and "--resume" in line
        assert [path.name for path in (disk / "run/checkpoints").glob("step_*")] == ["step_00000004"]
        shutil.copytree(disk / "run", tmp_path / "moved", symlinks=True)
    done = run("train", recipe, epochs, "--output", tmp_path / "moved", "--ranks", "2", "--resume")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "moved/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 13))


@pytest.mark.slow
def test_disk_filled_by_others_while_training_then_resume(recipe: Path, tmp_path: Path) -> None:
    """Not even a line of metrics fits."""
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        output = disk / "run"
        command = [sys.executable, "-m", "dist_train.cli", "train", recipe, "training.epochs=900", "--output", output]
        process = subprocess.Popen(
            [*map(str, command), "--ranks", "2"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        deadline = time.monotonic() + 100
        while not (output / "checkpoints/last").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="space"):
            while True:
                filler.write(bytes(4096))
        printed = process.communicate(timeout=100)[1]
        assert process.returncode == REFUSED and "Traceback" not in printed, printed
        assert "--resume" in errors(printed)[0]
        state = json.loads((output / "checkpoints/last/state.json").read_text())
        shutil.copytree(output, tmp_path / "moved", symlinks=True)
    epochs = state["progress"]["epoch"] + 1
    changes = f"training.epochs={epochs}"
    done = run("train", recipe, changes, "--output", tmp_path / "moved", "--ranks", "2", "--resume")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "moved/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 4 * epochs + 1))
