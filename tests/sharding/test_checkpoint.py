"""Checkpoints and modules: what fits goes in, what does not is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sharding import checkpoint, portable
from sharding.errors import UserError
from sharding.portable import Portable


def test_weights_go_into_a_module_that_fits(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    weight = torch.randn(3, 4)
    portable.write(tmp_path / "saved", [("layer.weight", weight)], [], {})
    saved = Portable(tmp_path / "saved")
    model = Model()
    checkpoint.load_weights(model, saved)
    assert torch.equal(model.layer.weight, weight)
    model.layer = nn.Linear(4, 2, bias=False)
    with pytest.raises(UserError, match=r"layer\.weight has shape"):
        checkpoint.load_weights(model, saved)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(UserError, match="other parameters"):
        checkpoint.load_weights(model, saved)


def test_fingerprints_see_every_frozen_bit_and_no_trainable() -> None:
    frozen, trained, half = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3), nn.Linear(2, 2)
    half.bias.requires_grad_(False)
    model = nn.ModuleDict({"a": frozen, "b": trained, "c": half})
    before = checkpoint.fingerprints(model)
    assert before.keys() == {"a", "c"}
    nn.init.zeros_(trained.weight)
    nn.init.zeros_(half.weight)
    assert checkpoint.fingerprints(model) == before
    with torch.no_grad():
        frozen.weight[2, 1].add_(1e-3)
    after = checkpoint.fingerprints(model)
    assert after["a"] != before["a"] and after["c"] == before["c"]
