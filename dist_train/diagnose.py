"""Which term and which clips made a loss or a gradient non-finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_train.batch import Batch
from dist_train.fusion import FlowOutput
from dist_train.global_loss import GlobalLoss, Rows
from dist_train.losses import LossSettings, double_flow_loss
from sharding.collectives import gather_objects
from sharding.errors import UserError

SHOWN = 8  # keys named in the message


def non_finite_loss(step: int, result: GlobalLoss, batches: list[Batch], keys: Sequence[str]) -> UserError:
    """The error for a loss over these micro-batches that is not finite (collective)."""
    terms = [name for name, term in result.terms.items() if not term.isfinite()] or ["their weighted sum"]
    rows = bad_rows([*result.rows.complete, *result.rows.missing, result.rows.asr, *result.rows.notes.values()])
    return explain(step, "loss", terms, guilty_keys(rows, batches, keys))


def non_finite_gradient(
    step: int, seen: list[tuple[Rows, list[Batch]]], settings: LossSettings, keys: Sequence[str]
) -> UserError:
    """The error for a gradient that is not finite although every loss is (collective).

    Differentiates each term alone. `seen`: what each loss was taken of, and the micro-batches it came from.
    """
    terms: dict[str, None] = {}
    guilty: list[str] = []
    suspects: list[str] = []
    for rows, batches in seen:
        bad = torch.zeros(len(rows.label), dtype=torch.bool, device=rows.label.device)
        for name, hit in bad_gradients(rows, settings).items():
            terms[name] = None
            bad |= hit
        named = guilty_keys(bad, batches, keys)
        suspects += named
        guilty += named if bad.any() else []
    return explain(
        step, "gradient", list(terms) or ["none by itself: it arises inside the network"], guilty or suspects
    )


def bad_gradients(rows: Rows, settings: LossSettings) -> dict[str, Tensor]:
    """Terms whose gradient is not finite, each with the rows [n] bool it is not finite for."""
    if len(rows.label) == 0:
        return {}
    outputs = [part.detach().requires_grad_() for part in (*rows.complete, *rows.missing, *rows.notes.values())]
    flow = len(FlowOutput._fields)
    complete, missing = FlowOutput(*outputs[:flow]), FlowOutput(*outputs[flow : 2 * flow])
    notes = dict(zip(rows.notes, outputs[2 * flow :], strict=True))
    found = {}
    for name, term in double_flow_loss(complete, missing, rows.label, rows.has_teacher, settings, notes)[1].items():
        gradients = torch.autograd.grad(term, outputs, retain_graph=True, allow_unused=True)
        hit = bad_rows([gradient for gradient in gradients if gradient is not None])
        if hit.any():
            found[name] = hit
    return found


def bad_rows(tensors: list[Tensor]) -> Tensor:
    """[n] bool: rows with a value that is not finite in any of the tensors [n, …]."""
    return torch.stack(
        [
            ~tensor.detach().flatten(1).isfinite().all(1) if tensor.dim() > 1 else ~tensor.detach().isfinite()
            for tensor in tensors
        ]
    ).any(0)


def guilty_keys(rows: Tensor, batches: list[Batch], keys: Sequence[str]) -> list[str]:
    """Keys of the marked rows of these micro-batches; of all their clips where none stands out (collective)."""
    real = [index for batch in batches for index in batch["index"][batch["real"]].tolist()]
    names = [keys[index] for part in gather_objects(real) for index in part]
    return [name for name, hit in zip(names, rows.tolist(), strict=True) if hit] or names


def explain(step: int, what: str, terms: list[str], guilty: list[str]) -> UserError:
    """Names step, terms and clips."""
    more = f" and {len(guilty) - SHOWN} more" if len(guilty) > SHOWN else ""
    return UserError(
        f"step {step}",
        f"the {what} is not finite; terms: {', '.join(terms)}; samples: {', '.join(guilty[:SHOWN])}{more}",
        "Look at these samples, lower optimizer.learning_rate or set optimizer.clip_norm. "
        "Nothing was saved from this step.",
    )
