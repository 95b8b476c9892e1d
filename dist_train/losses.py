"""The six loss terms of the double flow, and the ASR term, over the rows of one global batch.

Pure functions of tensors: gathering over ranks and dropping fillers is the caller's part. Everything is computed in
fp32 (float64 stays float64). Source: SDUMC (arXiv 2410.15029) and its released code; Rank-N-Contrast, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.fusion import FlowOutput, prediction_errors
from dist_train.names import FLOWS

# Two label distances closer than this count as equal (official code).
RNC_SLACK = 1e-4
VALUE_EDGE = 1e-4
VALUE_SPREAD = 0.1


class LossSettings(BaseModel):
    """Weights of the six loss terms (defaults: the released final script), their two constants; the weight of ASR."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mse_complete: float = Field(
        default=0.5, ge=0, description="Weight of the squared error of the complete flow's prediction. Default: 0.5."
    )
    mse_missing: float = Field(
        default=0.5, ge=0, description="Weight of the squared error of the missing flow's prediction. Default: 0.5."
    )
    ce_complete: float = Field(
        default=0.5,
        ge=0,
        description="In classification: weight of the cross-entropy of the complete flow, in place of its squared "
        "error. Default: 0.5.",
    )
    ce_missing: float = Field(
        default=0.5,
        ge=0,
        description="In classification: weight of the cross-entropy of the missing flow, in place of its squared "
        "error. Default: 0.5.",
    )
    mkd1: float = Field(
        default=0.1, ge=0, description="Weight of MKD-1: RMSE to the real flow's text vector, detached. Default: 0.1."
    )
    mkd2: float = Field(
        default=0.7, ge=0, description="Weight of MKD-2: RMSE to the real flow's text views, detached. Default: 0.7."
    )
    rs: float = Field(
        default=0.13, ge=0, description="Weight of L_RS: RMSE between the two flows' representations. Default: 0.13."
    )
    rnc: float = Field(default=0.5, ge=0, description="Weight of Rank-N-Contrast over both flows. Default: 0.5.")
    asr: float = Field(
        default=0.0,
        ge=0,
        description="Weight of ASR (SLAM-ASR, arXiv 2402.08846): cross-entropy of the transcript given the audio, in "
        "nats per token, over all clips of a step. Default: 0, no ASR.",
    )
    rnc_temperature: float = Field(
        default=2.0, gt=0, description="Temperature: similarity = -L2 distance / temperature. Default: 2."
    )
    value: float = Field(
        default=0.1,
        ge=0,
        description="With `refine: vgmr`: weight of aligning the values with what a modality is worth. Default: 0.1.",
    )
    value_spread: float = Field(
        default=0.01,
        ge=0,
        description="With `refine: vgmr`: weight of keeping the values from being all the same. Default: 0.01.",
    )
    value_temperature: float = Field(
        default=0.5,
        gt=0,
        description="With `refine: vgmr`: growth of the squared error without a modality, in labels squared (of the "
        "cross-entropy in classification, in nats), that asks for a value of 0.73. Default: 0.5.",
    )
    alignment: float = Field(
        default=0.2,
        ge=0,
        description="With `imagination: cmpt`: weight of the proxies' distance to what they stand for. Default: 0.2.",
    )
    worth: float = Field(
        default=0.1,
        ge=0,
        description="With `imagination: promma`: weight of the evaluator's cross-entropy on whether imagined text "
        "lowered the error. Default: 0.1.",
    )
    epsilon: float = Field(
        default=1e-12,
        gt=0,
        description="Added to the mean square under the root of each RMSE, so that its gradient stays finite when both "
        "sides are equal. Default: 1e-12.",
    )

    def compares_flows(self, classifies: bool) -> bool:
        """Whether any of the six terms of a task counts; without them only ASR trains (projector pre-training)."""
        errors = (self.ce_complete, self.ce_missing) if classifies else (self.mse_complete, self.mse_missing)
        return any((*errors, self.mkd1, self.mkd2, self.rs, self.rnc))


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_rmse(student: Tensor, teacher: Tensor, rows: Tensor, epsilon: float) -> Tensor:
    """``sqrt(mean((student - teacher)^2) + epsilon)`` over all features of the chosen rows; 0 if none is chosen.

    With epsilon under the root the gradient is bounded by 1 / sqrt(elements) and 0 at equality.

    Args:
        student, teacher: [n, ...].
        rows: bool [n].
    """
    squares = (_exact(student) - _exact(teacher)).square().flatten(1).mean(1)
    chosen = rows.to(squares.dtype)
    mean = (squares * chosen).sum() / chosen.sum().clamp(min=1)
    return (mean + epsilon).sqrt() * rows.any()


def rank_n_contrast(features: Tensor, labels: Tensor, temperature: float, *, nominal: bool = False) -> Tensor:
    """Rank-N-Contrast: mean over all ordered pairs (i, k), k != i, of -log of the softmax share of k.

    Similarity is -L2 / temperature. The share's denominator runs over all j != i whose label is at least as far from
    anchor i as k's: ``|y_i - y_j| >= |y_i - y_k| - 1e-4``. Sorted by label distance these j are a suffix of the row, so
    one cumulative log-sum-exp serves all k. Time O(N^2 log N), memory O(N^2).

    Args:
        features: [N, D], N >= 2.
        labels: [N].
        temperature: > 0.
        nominal: labels are classes: equal ones are 0 apart, others 1. Where k is of the anchor's class, the denominator
            runs over all j (supervised contrastive loss, arXiv 2004.11362); else over the other classes.

    Raises:
        ValueError: fewer than two rows.
    """
    n = len(features)
    if n < 2:
        raise ValueError(f"rank_n_contrast needs at least two rows, got {n}")
    features, labels = _exact(features), _exact(labels)
    # Exact differences: the matrix-product form of cdist cancels for near rows. The gradient at distance 0 is 0.
    similarity = -torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / temperature
    distance = (labels[:, None] - labels[None, :]).abs()
    distance = (distance > 0).to(distance.dtype) if nominal else distance
    # The anchor itself sorts first and is cut off.
    distance, order = distance.fill_diagonal_(-torch.inf).sort(dim=1)
    distance, order = distance[:, 1:].contiguous(), order[:, 1:]
    similarity = similarity.gather(1, order)
    suffix = similarity.flip(1).logcumsumexp(1).flip(1)
    start = torch.searchsorted(distance, distance - RNC_SLACK)
    return (suffix.gather(1, start) - similarity).mean()


def transcription_loss(asr: Tensor) -> Tensor:
    """Mean negative log-likelihood per transcript token over all n clips, from their sums and counts [n, 2]."""
    sums, counts = _exact(asr).unbind(1)
    return sums.sum() / counts.sum().clamp(min=1)


def value_loss(estimates: Tensor, worth: Tensor, temperature: float) -> Tensor:
    """How far VGMR's estimates are from what the modalities are worth: KL divergence in nats, mean over everything.

    The paper aligns g and the mean of p with the growth of the loss without a modality and gives no formula. Here the
    target is ``sigmoid(worth / temperature)``: 0.5 for a modality that makes no difference, more for one that helps.

    Args:
        estimates: [n, 3, k] in (0, 1).
        worth: [n, 3] growth of the prediction's error; no gradient goes there.
    """
    target = torch.sigmoid(_exact(worth.detach()) / temperature)[..., None].expand_as(estimates)
    # both sides kept off 0 and 1, where the logarithm ends
    estimates, target = (x.clamp(VALUE_EDGE, 1 - VALUE_EDGE) for x in (_exact(estimates), target))
    surprise = target * (target / estimates).log() + (1 - target) * ((1 - target) / (1 - estimates)).log()
    return surprise.mean()


def value_spread_loss(estimates: Tensor, spread: Tensor) -> Tensor:
    """Keeps VGMR's values from collapsing: hinges on their standard deviation over clips, and of p over channels.

    The paper names such a regularisation and gives no formula; this is the variance term of VICReg (arXiv 2105.04906):
    the share by which each standard deviation stays below 0.1, mean over modalities.

    Args:
        estimates: [n, 3, k].
        spread: [n, 3, 1] standard deviation over channels; [n, 3, 0] without p.
    """
    over_clips = (_exact(estimates).var(0, correction=0) + VALUE_EDGE**2).sqrt()
    hinges = [
        (1 - deviation / VALUE_SPREAD).clamp(min=0).mean()
        for deviation in (over_clips, _exact(spread))
        if deviation.numel()
    ]
    return torch.stack(hinges).mean()


def alignment_loss(distances: Tensor, epsilon: float) -> Tensor:
    """CMPT's alignment over complete clips: sum over pairs of MSE(proxy, target), by the mean MSE(proxy, own modality).

    With two modalities the paper divides by the distance of one of the two proxies to its own class token; here by the
    mean of all.

    Args:
        distances: [n, pairs, 3] MSE to the target, MSE to the own vector, whether the clip counts.
        epsilon: added to the denominator.
    """
    to_target, to_own, counts = _exact(distances).unbind(2)
    clips = counts.sum(0).clamp(min=1)
    targets, own = ((part * counts).sum(0) / clips for part in (to_target, to_own))
    return targets.sum() / (own.mean() + epsilon)


def worth_loss(worth: Tensor, gain: Tensor) -> Tensor:
    """Cross-entropy of ProMMA's evaluator in nats, mean over the clips it is asked about; 0 if there are none.

    Args:
        worth: [n, 3] logit, whether the clip counts, and what is not looked at.
        gain: [n] by how much the prediction's error is smaller with the imagined text; its sign is the pseudo-label.
    """
    logit = _exact(worth[:, 0])
    surprise = binary_cross_entropy_with_logits(logit, (gain > 0).to(logit.dtype), reduction="none")
    return (surprise * worth[:, 1]).sum() / worth[:, 1].sum().clamp(min=1)


def double_flow_loss(
    complete: FlowOutput,
    missing: FlowOutput,
    labels: Tensor,
    has_teacher: Tensor,
    settings: LossSettings,
    notes: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the six terms over one global batch, and the unweighted terms by name.

    MKD-1 and MKD-2 detach the real side, so they reach the missing flow only; L_RS detaches nothing. Those three count
    only rows with `has_teacher`; with no such row they are 0 but stay in the graph.

    Of a classifier (predictions are logits) cross-entropy takes the place of the squared error, and RNC compares
    classes by whether they are equal. The paper distils no predictions, so no logits are distilled either.

    Args:
        complete, missing: outputs of the two flows over the same n clips.
        labels: [n] valence, or the places of classes.
        has_teacher: bool [n], False for a clip that has not what the missing flow does without.
        settings: weights and constants.
        notes: what parts beside the two flows say of each clip (`Fused.notes`); each adds its terms.

    Returns:
        The scalar loss and ``{"mse_complete", "mse_missing", "mkd1", "mkd2", "rs", "rnc"}``, all attached to the graph
        ("ce_complete" and "ce_missing" in the place of the first two of a classifier);
        0 and no terms if all six weights are 0. With VGMR also "value" and "value_spread", with CMPT
        "alignment", with ProMMA "worth".
    """
    classifies = complete.prediction.dim() == 2
    if not settings.compares_flows(classifies):
        return labels.new_zeros(()), {}
    labels = _exact(labels)

    def rmse(student: Tensor, teacher: Tensor) -> Tensor:
        return masked_rmse(student, teacher, has_teacher, settings.epsilon)

    error = "ce" if classifies else "mse"
    both = torch.cat((complete.rnc, missing.rnc))
    terms = {
        f"{error}_complete": prediction_errors(complete.prediction, labels).mean(),
        f"{error}_missing": prediction_errors(missing.prediction, labels).mean(),
        "mkd1": rmse(missing.query, complete.query.detach()),
        "mkd2": rmse(missing.views, complete.views.detach()),
        "rs": rmse(missing.representation, complete.representation),
        "rnc": rank_n_contrast(both, labels.repeat(2), settings.rnc_temperature, nominal=classifies),
    }
    if "worth/complete" in notes:
        sides = [[notes[f"{field}/{flow}"] for field in ("estimates", "worth", "spread")] for flow in FLOWS]
        if sides[0][0].numel():
            of = [value_loss(estimates, worth, settings.value_temperature) for estimates, worth, _ in sides]
            terms["value"] = torch.stack(of).mean()
            terms["value_spread"] = torch.stack([value_spread_loss(seen, spread) for seen, _, spread in sides]).mean()
    if "alignment" in notes:
        terms["alignment"] = alignment_loss(notes["alignment"], settings.epsilon)
    if "gain" in notes and "worth" in notes:
        terms["worth"] = worth_loss(notes["worth"], notes["gain"].detach())
    return sum(getattr(settings, name) * term for name, term in terms.items()), terms
