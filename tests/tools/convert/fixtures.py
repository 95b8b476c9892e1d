"""Runs, the folders they started from, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.end_to_end.commands import call, errors
from tests.tools.convert.runs import Made, MakeRun, bases, make_run

Convert = Callable[..., Path]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("convert") / "shards")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama's and a WavLM's folder."""
    torch.manual_seed(0)
    return bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, shards: Path, folders: dict[str, Path]) -> MakeRun:
    """A run whose LLM and WavLM are tuned in this way, beside pretrained folders; made once each, not to be changed."""
    known: dict[str, Made] = {}

    def make(tuning: str = "lora", **changes: Any) -> Made:
        name = f"{tuning}{sorted(changes.items())}"
        if name not in known:
            values: dict[str, Any] = {
                key: {"config": None, "pretrained": str(folders[part]), "tuning": tuning}
                | ({} if tuning == "full" else {tuning: {"rank": 3}})
                for key, part in (("audio", "audio"), ("text", "llm"))
            }
            path = tmp_path_factory.mktemp("run") / "run"
            known[name] = make_run(path, shards, **tiny.merge(values, changes))
        return known[name]

    return make


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs `dist-train convert` in this process; returns the result's folder."""

    def carry_out(src: Path, to: str, *options: str | Path, name: str = "converted") -> Path:
        capsys.readouterr()
        assert call("convert", src, tmp_path / name, "--to", to, *options) == 0, capsys.readouterr().err
        return tmp_path / name

    return carry_out


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one error line of a conversion that is refused and leaves nothing."""

    def refuse(src: Path, to: str, *options: str | Path, dst: Path | None = None) -> str:
        dst = dst or tmp_path / "refused"
        capsys.readouterr()
        before = dst.exists()
        assert call("convert", src, dst, "--to", to, *options) == 2
        assert dst.exists() == before and not list(dst.parent.glob("*.writing"))
        printed = capsys.readouterr().err
        (line,) = errors(printed)
        assert "Traceback" not in printed
        return line

    return refuse
