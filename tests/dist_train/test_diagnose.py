from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train import diagnose
from dist_train.diagnose import non_finite_gradient, non_finite_loss
from dist_train.fusion import FlowOutput
from dist_train.global_loss import GlobalLoss, global_loss, pack
from dist_train.losses import LossSettings
from dist_train.model import Flows

pytestmark = pytest.mark.usefixtures("world_of_one")
SETTINGS = LossSettings()
ROWS = 5
# Positions in the split: not the rows' order, and row 1 is a filler.
INDEX, REAL = [7, 3, 0, 9, 4], [True, False, True, True, True]
KEYS = [f"clip{i}" for i in range(10)]


def flow(rows: int = ROWS) -> FlowOutput:
    return FlowOutput(*(torch.randn(rows, *shape) for shape in ((), (6,), (4,), (8,), (7, 3))))


def batch() -> Any:
    values = {"label": torch.randn(ROWS), **modalities(torch.tensor([True, True, False, True, True]))}
    return {**values, "real": torch.tensor(REAL), "index": torch.tensor(INDEX)}


def modalities(text: Tensor) -> dict[str, Tensor]:
    """Of clips that have audio and vision, and lose their text."""
    present = {"audio_present": torch.ones_like(text), "text_present": text, "vision_present": torch.ones_like(text)}
    return {**present, "dropped": torch.tensor([[False, True, False]] * len(text))}


def finite(result: GlobalLoss) -> bool:
    return all(map(math.isfinite, result.values().values()))


CASES = [
    ("complete", "prediction", ["mse_complete"]),
    ("missing", "prediction", ["mse_missing"]),
    ("missing", "query", ["mkd1"]),
    ("complete", "views", ["mkd2"]),
    ("missing", "representation", ["rs"]),
    ("complete", "rnc", ["rnc"]),
]


@pytest.mark.parametrize(("which", "part", "terms"), CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_term_and_clip(which: str, part: str, terms: list[str], value: float) -> None:
    for row in (2, 4):
        flows = Flows(flow(), flow(), torch.tensor(11), torch.tensor(22))
        getattr(getattr(flows, which), part)[row].view(-1)[-1] = value
        made = batch()
        result = global_loss([pack(flows, made)], SETTINGS)
        assert not finite(result)
        message = str(non_finite_loss(3, result, [made], KEYS))
        assert message.startswith(f"step 3: the loss is not finite; terms: {', '.join(terms)}; ")
        assert f"samples: clip{INDEX[row]}. " in message


def test_a_filler_cannot_spoil_the_loss() -> None:
    flows = Flows(flow(), flow(), torch.tensor(11), torch.tensor(22))
    flows.complete.prediction[1] = float("nan")
    assert finite(global_loss([pack(flows, batch())], SETTINGS))


def test_where_no_clip_stands_out_all_are_named_up_to_eight() -> None:
    """A sum that overflows although every output is finite."""
    rows = 11
    flows = Flows(flow(rows), flow(rows), torch.tensor(11), torch.tensor(22))
    flows.complete.prediction.fill_(3e19)
    keys = [f"k{i}" for i in range(rows)]
    made: Any = {
        "label": torch.zeros(rows),
        **modalities(torch.ones(rows, dtype=torch.bool)),
        "real": torch.ones(rows, dtype=torch.bool),
    }
    made["index"] = torch.arange(rows)
    result = global_loss([pack(flows, made)], SETTINGS)
    assert not finite(result)
    message = str(non_finite_loss(1, result, [made], keys))
    assert "terms: mse_complete; samples: k0, k1, k2, k3, k4, k5, k6, k7 and 3 more." in message


def test_a_weight_alone_can_spoil_the_sum() -> None:
    made, heavy = batch(), LossSettings(mse_complete=1e38)
    flows = Flows(flow(), flow(), torch.tensor(11), torch.tensor(22))
    flows.complete.prediction.fill_(1e3)
    result = global_loss([pack(flows, made)], heavy)
    assert not finite(result)
    assert "terms: their weighted sum" in str(non_finite_loss(1, result, [made], KEYS))


def test_a_gradient_that_alone_is_not_finite_names_term_and_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKD-1 without its epsilon, one root per clip: at equality its value is 0 and its gradient NaN."""

    def losses(complete: FlowOutput, missing: FlowOutput, labels: Tensor, *_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        distance = (missing.query - complete.query.detach()).square().sum(1).sqrt()
        terms = {"mse_missing": (missing.prediction - labels).square().mean(), "mkd1": distance.mean()}
        return terms["mse_missing"] + terms["mkd1"], terms

    monkeypatch.setattr(diagnose, "double_flow_loss", losses)
    flows = Flows(flow(), flow(), torch.tensor(11), torch.tensor(22))
    for row in (2, 4):
        flows.missing.query[row] = flows.complete.query[row]
    made = batch()
    result = global_loss([pack(flows, made)], SETTINGS)
    assert finite(result)
    message = str(non_finite_gradient(5, [(result.rows, [made])], SETTINGS, KEYS))
    assert message.startswith("step 5: the gradient is not finite; terms: mkd1; samples: clip0, clip4. ")


def test_a_gradient_that_breaks_inside_the_network_says_so() -> None:
    made = batch()
    result = global_loss([pack(Flows(flow(), flow(), torch.tensor(11), torch.tensor(22)), made)], SETTINGS)
    message = str(non_finite_gradient(5, [(result.rows, [made])], SETTINGS, KEYS))
    assert "inside the network" in message
    assert all(f"clip{index}" in message for index, real in zip(INDEX, REAL, strict=True) if real)
    assert "clip3" not in message
