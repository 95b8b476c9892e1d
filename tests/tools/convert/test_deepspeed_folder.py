"""DeepSpeed's checkpoints through the command: nothing is lost on the way, moments included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sharding.portable import Portable
from tests.tools.convert.fixtures import Convert
from tests.tools.convert.runs import MakeRun
from tools.convert import deepspeed_native


def test_universal_and_back(made: MakeRun, convert: Convert) -> None:
    run = made("lora")
    universal = convert(run.path, "deepspeed-universal", name="universal")
    back = Portable(convert(universal, "portable", name="back"))
    before = Portable(run.best)
    assert back.state["adam_step"] == 7
    for kind in ("model", "optimizer"):
        assert back.names(kind) == before.names(kind)
        for name, value in before.tensors(kind):
            assert torch.equal(back.tensor(kind, name), value)
    told = Portable(convert(universal, "portable", "--run", run.path, name="told")).state
    assert told["bases"] == before.state["bases"]


@pytest.mark.slow  # the ranks that write the checkpoints take 20 s
@pytest.mark.parametrize("case", ["zero1_fp32", "zero2_trainables", "zero3_bf16"])
def test_native(case: str, saved: Path, convert: Convert) -> None:
    held = deepspeed_native.read(saved / case)
    back = Portable(convert(saved / case, "portable"))
    frozen = set(held.state.get("frozen", ()))
    assert back.state["adam_step"] == held.state["adam_step"] > 0
    assert set(back.names("model")) == held.weights.shapes.keys() - frozen
    for name in back.names("model"):
        assert torch.equal(back.tensor("model", name), held.weights.read(name))
    assert set(back.names("optimizer")) == held.moments.shapes.keys()
    for name, value in held.moments:
        assert torch.equal(back.tensor("optimizer", name), value)
