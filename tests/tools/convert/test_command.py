"""`dist-train convert`: what it says, what it leaves, what it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.end_to_end.commands import call
from tests.tools.convert.fixtures import Convert
from tests.tools.convert.runs import MakeRun
from tools.convert import huggingface
from tools.convert.formats import FORMATS
from tools.convert.page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_a_dry_run_tells_and_writes_nothing(made: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", made("lora").path, tmp_path / "made", "--to", "huggingface", "--dry-run") == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "bfloat16" in said and "tokenizer.json" in said
    assert "Left out" in said and "weights of fusion" in said and "nothing is written" in said


def test_provenance(made: MakeRun, convert: Convert) -> None:
    run = made("lora")
    told = json.loads((convert(run.path, "slam") / "provenance.json").read_text())
    assert told["format"] == "slam" and told["source"]["path"] == str(run.path) and told["date"] and told["dist_train"]
    for name, checksum in told["source"]["files"].items():
        assert hashlib.sha256(Path(name).read_bytes()).hexdigest() == checksum
    assert told["bases"].keys() == {"llm", "audio"}
    told = json.loads((convert(run.path, "peft", name="adapter") / "provenance.json").read_text())
    assert told["base"] == run.recipe.text.pretrained


def test_help_loads_nothing_heavy() -> None:
    asked = "from dist_train.cli import main; import sys, contextlib\n"
    asked += "with contextlib.suppress(SystemExit): main(args=['convert', '--help'])\n"
    asked += "assert not {'torch', 'tools'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", asked], check=True)


def test_what_is_refused(made: MakeRun, tmp_path: Path, refused: Callable[..., str], folders: dict[str, Path]) -> None:
    run = made("lora")
    assert "is no format" in refused(run.path, "gguf")
    assert "not written" in refused(run.path, "llama2c")
    assert "is not there" in refused(tmp_path / "absent", "peft")
    assert "of no format that is known" in refused(tmp_path, "peft")
    assert "exists already" in refused(run.path, "peft", dst=tmp_path)
    assert "Write fp32 or bf16" in refused(run.path, "peft", "--dtype", "int8")
    assert "is not a run directory" in refused(run.best, "peft", "--run", tmp_path)
    assert "is no folder" in refused(run.path, "huggingface", "--base", tmp_path / "absent")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in run.best.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = next(copy.glob("model-*"))
    model.write_bytes(model.read_bytes()[:-1])
    assert "missing or damaged" in refused(copy, "peft", "--run", run.path)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in folders["llm"].iterdir():
        data = file.read_bytes()
        (cut / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert "cannot be read" in refused(run.path, "huggingface", "--base", cut)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_is_not_ours(made: MakeRun, tmp_path: Path, refused: Callable[..., str]) -> None:
    tmp_path.chmod(0o500)
    assert "is not yours to write" in refused(made("lora").path, "peft")


def test_a_full_disk_leaves_nothing(
    made: MakeRun, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(place: Path, tensors: object) -> None:
        (place / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface, "write_shards", full)
    assert "No space left on device" in refused(made("lora").path, "huggingface")
    assert not list(tmp_path.iterdir())


def test_a_result_that_reads_differently_is_removed(
    made: MakeRun, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = huggingface.reopened

    def wrong(*arguments: object) -> list[tuple[str, Tensor]]:
        found = dict(right(*arguments))  # type: ignore[arg-type]
        name = "model.layers.1.mlp.up_proj.weight"
        found[name] = torch.cat([found[name][1:], found[name][:1]])
        return list(found.items())

    monkeypatch.setattr(huggingface, "reopened", wrong)
    assert "reads model.layers.1.mlp.up_proj.weight differently" in refused(made("lora").path, "huggingface")
    assert not list(tmp_path.iterdir())


def test_every_format_is_in_the_table_once() -> None:
    names = [one.name for one in FORMATS]
    assert len(set(names)) == len(names)
    assert all(one.plan or one.why_not for one in FORMATS) and all(one.read or one.why_not for one in FORMATS)
