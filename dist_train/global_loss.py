"""The six losses over the global batch: one differentiable exchange, then the same loss on every rank (DESIGN §4.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.batch import Batch
from dist_train.fusion import FlowOutput
from dist_train.losses import LossSettings, double_flow_loss
from dist_train.model import Flows
from sharding.collectives import gather_rows


class GlobalLoss(NamedTuple):
    """loss [] and its unweighted terms; rows: the gathered outputs of real clips; clips: how many; tokens: language
    model positions of all ranks.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    rows: Rows
    clips: int
    tokens: int

    def values(self) -> dict[str, float]:
        """`loss` and the terms as numbers, in one read of the device."""
        stacked = torch.stack([self.loss, *self.terms.values()]).detach()
        return dict(zip(("loss", *self.terms), stacked.tolist(), strict=True))


class Rows(NamedTuple):
    """Outputs of n clips of all ranks, fillers dropped."""

    complete: FlowOutput
    missing: FlowOutput
    label: Tensor
    has_teacher: Tensor

    def detached(self) -> Rows:
        """The same values without their graph."""
        complete, missing = (FlowOutput(*(part.detach() for part in flow)) for flow in (self.complete, self.missing))
        return Rows(complete, missing, self.label, self.has_teacher)


def global_loss(flows: Flows, batch: Batch, settings: LossSettings) -> GlobalLoss:
    """Loss of the clips of all ranks in this micro-step.

    The gradient that data-parallel averaging makes of it equals that of one process holding all clips. A clip
    without transcript has no teacher: it enters
    MSE and RNC, not the distillation terms.
    """
    rows, tokens = gather(flows, batch)
    clips = len(rows.label)
    if clips == 0:  # only fillers: keep every parameter in the graph
        nothing = sum(part.float().sum() * 0 for flow in (flows.complete, flows.missing) for part in flow)
        return GlobalLoss(torch.as_tensor(nothing), {}, rows, 0, tokens)
    loss, terms = double_flow_loss(rows.complete, rows.missing, rows.label, rows.has_teacher, settings)
    return GlobalLoss(loss, terms, rows, clips, tokens)


def gather(flows: Flows, batch: Batch) -> tuple[Rows, int]:
    """Packs everything a loss needs of a clip into one fp32 row, exchanges the rows once, and unpacks them."""
    parts = [*flows.complete, *flows.missing]
    count = len(batch["label"])
    share = (flows.tokens / count).float().expand(count)
    extra = torch.stack([batch["label"], batch["text_present"].float(), batch["real"].float(), share], 1)
    packed = torch.cat([part.float().reshape(count, -1) for part in parts] + [extra], 1)
    whole = gather_rows(packed)
    tokens = round(whole[:, -1].sum().item())
    whole = whole[whole[:, -2] > 0]
    sizes = [part[0].numel() for part in parts]
    *columns, label, has_text, _, _ = whole.split([*sizes, 1, 1, 1, 1], 1)
    restored = [column.reshape(len(whole), *part.shape[1:]) for column, part in zip(columns, parts, strict=True)]
    flow = len(FlowOutput._fields)
    return Rows(FlowOutput(*restored[:flow]), FlowOutput(*restored[flow:]), label[:, 0], has_text[:, 0] > 0), tokens
