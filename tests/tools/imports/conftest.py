"""Runs the command in this process, and reads what it made."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train import cli
from sharding.shards import load_info
from sharding.stream import ShardedSplit


@dataclass
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


class Importer:
    """A folder with sources, and the command."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.rng = np.random.default_rng()
        self.out = folder / "out"

    def array(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def run(self, *words: Any) -> Outcome:
        """`dist-train WORDS`."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(args=list(map(str, words)), prog_name="dist-train")
        code = caught.value.code
        assert isinstance(code, int)
        return Outcome(code, *self.capsys.readouterr())

    def make(self, kind: str, source: Path, *options: Any) -> Outcome:
        words = ["--from", kind] if kind else []
        return self.run("shards", "make", *words, source, self.out, "--workers", 1, *options)

    def good(self, kind: str, source: Path, *options: Any) -> str:
        """An import that succeeds, and shards that pass `verify`; returns the summary."""
        made = self.make(kind, source, *options)
        assert made.code == 0, made.err
        assert self.run("shards", "verify", self.out).code == 0
        return " ".join(made.out.split())

    def refused(self, kind: str, source: Path, *options: Any) -> list[str]:
        """The error lines of an import that keeps nothing."""
        before = sorted(self.folder.iterdir())
        made = self.make(kind, source, *options)
        assert made.code == 2 and made.errors and "Traceback" not in made.err, made.err
        assert sorted(self.folder.iterdir()) == before
        return made.errors

    def samples(self) -> dict[str, dict[str, Any]]:
        """Everything that is in the shards, by key; `json` is KEY.json."""
        found: dict[str, dict[str, Any]] = {}
        for split in load_info(self.out).splits:
            part = ShardedSplit(self.out, split)
            found |= {part.keys[i]: {**part[i], "split": split} for i in range(len(part))}
            for tar in self.out.glob(f"{split}-*.tar"):
                with tarfile.open(tar) as archive:
                    for member in archive:
                        if member.name.endswith(".json"):
                            file = archive.extractfile(member)
                            assert file is not None
                            found[member.name.removesuffix(".json")]["json"] = json.load(file)
        return found

    def record(self) -> dict[str, Any]:
        return json.loads((self.out / "import.json").read_text())

    def set_aside(self) -> dict[str, str]:
        return {one.key: one.reason for one in load_info(self.out).set_aside}


@pytest.fixture
def importer(tmp_path, capsys):
    return Importer(tmp_path, capsys)
