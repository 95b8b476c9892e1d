"""The losses over the global batch, exact over ranks and micro-steps (DESIGN §4.3).

A loss that compares clips (RMSE, RNC) is no sum over ranks or micro-steps. So each clip's outputs are packed into one
row, the rows of all ranks and micro-steps are exchanged once, every rank computes the same loss of them and its
gradient with respect to the rows, and each micro-step then differentiates its own rows along that gradient (gradient
caching, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dist_train.batch import Batch
from dist_train.fusion import FlowOutput
from dist_train.losses import LossSettings, double_flow_loss, transcription_loss
from dist_train.missing import has_teacher
from dist_train.model import Flows
from sharding.collectives import gather_rows

FLOW = len(FlowOutput._fields)


class Packed(NamedTuple):
    """rows [B, W] fp32, with their graph: what a loss needs of each clip of a micro-batch; shapes: of its parts; notes:
    names of the last ones of these.
    """

    rows: Tensor
    shapes: tuple[torch.Size, ...]
    notes: tuple[str, ...] = ()

    def detached(self) -> Packed:
        """The same values without their graph."""
        return self._replace(rows=self.rows.detach())


class Rows(NamedTuple):
    """Outputs of n clips of all ranks, fillers dropped."""

    complete: FlowOutput
    missing: FlowOutput
    label: Tensor
    has_teacher: Tensor
    asr: Tensor
    notes: dict[str, Tensor]

    def detached(self) -> Rows:
        """The same values without their graph."""
        complete, missing = (FlowOutput(*(x.detach() for x in flow)) for flow in (self.complete, self.missing))
        notes = {name: note.detach() for name, note in self.notes.items()}
        return Rows(complete, missing, self.label, self.has_teacher, self.asr.detach(), notes)


class GlobalLoss(NamedTuple):
    """loss [] and its unweighted terms (no graph); rows: of the real clips of all ranks and micro-steps; clips: how
    many; tokens, passages: of the language model on all ranks (see Flows); gradients: of the loss, for each micro-batch
    [B, W].
    """

    loss: Tensor
    terms: dict[str, Tensor]
    rows: Rows
    clips: int
    tokens: int
    passages: int
    gradients: list[Tensor]

    def values(self) -> dict[str, float]:
        """`loss` and the terms as numbers, in one read of the device."""
        stacked = torch.stack([self.loss, *self.terms.values()])
        return dict(zip(("loss", *self.terms), stacked.tolist(), strict=True))

    def surrogate(self, micro: int, packed: Packed) -> Tensor:
        """A scalar whose gradients, summed over micro-steps and averaged over ranks, are those of the loss."""
        return (packed.rows * self.gradients[micro]).sum() * dist.get_world_size()


def pack(flows: Flows, batch: Batch) -> Packed:
    """Everything a loss needs of a clip in one row: the outputs of both flows, sum and count of ASR, label, whether it
    has what the missing flow lacks, whether it is real, and its shares of the language model's positions and passages.
    """
    count = len(batch["label"])
    asr = torch.zeros(count, 2, device=batch["label"].device) if flows.asr is None else flows.asr
    names = sorted(flows.notes)
    parts = [*flows.complete, *flows.missing, asr, *(flows.notes[name] for name in names)]
    shares = (torch.stack([flows.tokens, flows.passages]) / count).float().expand(count, 2)
    extra = torch.stack([batch["label"], has_teacher(batch).float(), batch["real"].float()], 1)
    rows = torch.cat([part.float().reshape(count, -1) for part in parts] + [extra, shares], 1)
    return Packed(rows, tuple(part.shape[1:] for part in parts), tuple(names))


def global_loss(packed: Sequence[Packed], settings: LossSettings, most: int | None = None) -> GlobalLoss:
    """Loss of the clips that all ranks packed in these micro-steps (collective).

    A clip without the modality that the missing flow lacks has no teacher: it enters MSE and RNC, not the distillation
    terms. Without any real clip the loss is 0.

    Args:
        packed: one per micro-step, the same number on all ranks.
        most: most rows that any rank packed; without it all have as many as this one.
    """
    local = torch.cat([part.rows.detach() for part in packed])
    most = len(local) if most is None else most
    whole = gather_rows(pad(local, (0, 0, 0, most - len(local)))).requires_grad_()  # rows of zeros are not real
    rows, tokens, passages = unpack(whole, packed[0].shapes, packed[0].notes)
    clips = len(rows.label)
    if clips == 0:
        loss, gradient = whole.new_zeros(()), torch.zeros_like(whole)
        terms: dict[str, Tensor] = {}
    else:
        loss, terms = double_flow_loss(rows.complete, rows.missing, rows.label, rows.has_teacher, settings, rows.notes)
        if settings.asr > 0:
            terms["asr"] = transcription_loss(rows.asr)
            loss = loss + settings.asr * terms["asr"]
        (gradient,) = torch.autograd.grad(loss, whole)
    own = gradient[dist.get_rank() * most :][: len(local)]
    return GlobalLoss(
        loss.detach(),
        {name: term.detach() for name, term in terms.items()},
        rows.detached(),
        clips,
        tokens,
        passages,
        list(own.split([len(part.rows) for part in packed])),
    )


def unpack(whole: Tensor, shapes: Sequence[torch.Size], notes: Sequence[str] = ()) -> tuple[Rows, int, int]:
    """Rows [N, W] of all ranks → those of real clips, and the language model's positions and passages."""
    tokens, passages = whole[:, -2:].double().sum(0).tolist()
    whole = whole[whole[:, -3] > 0]
    sizes = [shape.numel() for shape in shapes]
    *columns, label, taught, _, _ = whole.split([*sizes, 1, 1, 1, 2], 1)
    restored = [column.reshape(len(whole), *shape) for column, shape in zip(columns, shapes, strict=True)]
    complete, missing = FlowOutput(*restored[:FLOW]), FlowOutput(*restored[FLOW : 2 * FLOW])
    asr, *noted = restored[2 * FLOW :]
    named = dict(zip(notes, noted, strict=True))
    return Rows(complete, missing, label[:, 0].detach(), taught[:, 0] > 0, asr, named), round(tokens), round(passages)
