from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.fusion import FlowOutput
from dist_train.losses import LossSettings, double_flow_loss, masked_rmse, rank_n_contrast

TERMS = ["mse_complete", "mse_missing", "mkd1", "mkd2", "rs", "rnc"]


def rnc_by_definition(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The definition, pair by pair."""
    n = len(features)
    similarity = [[-(features[i] - features[j]).norm() / temperature for j in range(n)] for i in range(n)]
    total = features.new_zeros(())
    for i in range(n):
        for k in range(n):
            if k == i:
                continue
            reach = (labels[i] - labels[k]).abs() - 1e-4
            rivals = [similarity[i][j] for j in range(n) if j != i and (labels[i] - labels[j]).abs() >= reach]
            total = total - (similarity[i][k] - torch.stack(rivals).logsumexp(0))
    return total / (n * (n - 1))


def value_and_gradient(loss: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, features)[0]


def assert_rnc_equals_definition(features: Tensor, labels: Tensor, temperature: float = 2.0) -> None:
    features = features.requires_grad_()
    value, gradient = value_and_gradient(rank_n_contrast(features, labels, temperature), features)
    expected, expected_gradient = value_and_gradient(rnc_by_definition(features, labels, temperature), features)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm() + 1e-12


# Third steps tie in value but not in the last bit of their differences; 5e-5 apart ties by the slack only.
LABELS = st.sampled_from([k / 3 for k in range(-9, 10)] + [1.0 + 5e-5, 1.0 + 1.5e-4, 2e-4]) | st.floats(-3, 3)


@settings(max_examples=25, deadline=None)
@given(st.lists(LABELS, min_size=2, max_size=9), st.integers(0, 2**31), st.sampled_from([0.07, 1.0, 2.0]))
def test_rnc_equals_the_definition(labels: list[float], seed: int, temperature: float) -> None:
    features = torch.randn(len(labels), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_rnc_equals_definition(features, torch.tensor(labels, dtype=torch.float64), temperature)


@pytest.mark.parametrize(
    "labels", [[0.0] * 6, [1.0, 1.0, -1.0, -1.0, -1.0, 1.0], [0.0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4]]
)
def test_rnc_ties(labels: list[float]) -> None:
    assert_rnc_equals_definition(torch.randn(6, 4, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64))


def test_rnc_of_two_rows_is_zero() -> None:
    features = torch.randn(2, 64, requires_grad=True)
    value, gradient = value_and_gradient(rank_n_contrast(features, torch.tensor([1.0, 1.0]), 2.0), features)
    assert value == 0 and torch.isfinite(gradient).all()
    with pytest.raises(ValueError, match="two rows"):
        rank_n_contrast(features[:1], torch.ones(1), 2.0)


def test_rnc_of_equal_features() -> None:
    """Both flows of a clip may coincide: distance 0 has no direction, so no gradient; the others stay right."""
    half = torch.randn(4, 8, dtype=torch.float64)
    assert_rnc_equals_definition(half.repeat(2, 1), torch.tensor([0.0, 1.0, -2.0, 1.0], dtype=torch.float64).repeat(2))
    same = torch.ones(5, 8, requires_grad=True)
    assert not value_and_gradient(rank_n_contrast(same, torch.randn(5), 2.0), same)[1].any()


def test_rnc_survives_far_features() -> None:
    """exp(similarity) of every pair underflows, in fp32 and float64; the log-sum-exp does not."""
    features, labels = 300 * torch.randn(10, 64), torch.randn(10)
    exact = features.double().requires_grad_()
    value, gradient = value_and_gradient(rank_n_contrast(features.requires_grad_(), labels, 2.0), features)
    expected, expected_gradient = value_and_gradient(rnc_by_definition(exact, labels.double(), 2.0), exact)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - expected_gradient).norm() <= 5e-3 * expected_gradient.norm()


def test_rnc_needs_no_cubic_memory() -> None:
    """3,072 rows: N^3 floats would be 116 GB. Equal features make every share 1 / (size of its denominator)."""
    n = 3072
    labels = torch.randint(-3, 4, (n,)).float()
    counts = torch.bincount(labels.long() + 3, minlength=7).double()
    levels = torch.arange(-3, 4)
    reach = (levels[:, None] - levels[None, :]).abs()
    rivals = torch.stack([(counts * (reach >= reach[:, k, None])).sum(1) for k in range(7)], dim=1)
    # Every class (row: anchor's, column: positive's); the anchor itself is neither its own positive nor its rival.
    rivals[range(7), range(7)] -= 1
    pairs = counts[:, None] * counts[None, :] - counts.diag()
    expected = (pairs * rivals.log()).sum() / (n * (n - 1))
    assert rank_n_contrast(torch.ones(n, 2), labels, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def flow(n: int, *, width: int = 16, dtype: torch.dtype = torch.float64) -> FlowOutput:
    shapes = [(n,), (n, 128), (n, 64), (n, width), (n, 7, 128)]
    return FlowOutput(*(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes))


def test_terms_by_definition() -> None:
    complete, missing, labels = flow(5), flow(5), torch.randn(5, dtype=torch.float64)
    teacher = torch.tensor([True, False, True, True, False])
    loss, terms = double_flow_loss(complete, missing, labels, teacher, LossSettings())
    assert list(terms) == TERMS

    def rmse(a: Tensor, b: Tensor) -> float:
        return math.sqrt(((a - b)[teacher] ** 2).mean().item())

    expected = {
        "mse_complete": ((complete.prediction - labels) ** 2).mean().item(),
        "mse_missing": ((missing.prediction - labels) ** 2).mean().item(),
        "mkd1": rmse(missing.query, complete.query),
        "mkd2": rmse(missing.views, complete.views),
        "rs": rmse(missing.representation, complete.representation),
        "rnc": rnc_by_definition(torch.cat((complete.rnc, missing.rnc)), torch.cat((labels, labels)), 2.0).item(),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    weights = [0.5, 0.5, 0.1, 0.7, 0.13, 0.5]
    assert loss.item() == pytest.approx(sum(w * expected[name] for w, name in zip(weights, TERMS, strict=True)))


def test_distillation_reaches_the_missing_flow_only() -> None:
    complete, missing = flow(4), flow(4)
    _, terms = double_flow_loss(complete, missing, torch.randn(4), torch.ones(4, dtype=torch.bool), LossSettings())
    for name, field in (("mkd1", "query"), ("mkd2", "views")):
        left, right = getattr(complete, field), getattr(missing, field)
        gradients = torch.autograd.grad(terms[name], (left, right), allow_unused=True, retain_graph=True)
        assert gradients[0] is None and gradients[1].any()
    gradients = torch.autograd.grad(terms["rs"], (complete.representation, missing.representation))
    assert gradients[0].any() and torch.allclose(gradients[0], -gradients[1])


def test_no_teacher_at_all() -> None:
    complete, missing = flow(3), flow(3)
    loss, terms = double_flow_loss(complete, missing, torch.randn(3), torch.zeros(3, dtype=torch.bool), LossSettings())
    assert [terms[name].item() for name in ("mkd1", "mkd2", "rs")] == [0, 0, 0]
    loss.backward()
    for x in (missing.query, missing.views, missing.representation, complete.representation):
        assert x.grad is not None and not x.grad.any()


def test_a_clip_without_teacher_is_not_distilled() -> None:
    complete, missing = flow(4), flow(4)
    teacher = torch.tensor([True, True, False, True])
    loss, _ = double_flow_loss(complete, missing, torch.randn(4), teacher, LossSettings())
    query, views, prediction, rnc = torch.autograd.grad(
        loss, (missing.query, missing.views, missing.prediction, missing.rnc)
    )
    assert not query[~teacher].any() and query[teacher].any()
    assert not views[~teacher].any() and views[teacher].any()
    assert prediction.all() and rnc[~teacher].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rmse_at_and_near_equality(dtype: torch.dtype) -> None:
    """The official RMSE has a NaN gradient at equality; ours is 0 there and bounded by 1 / sqrt(elements) beside it."""
    teacher = torch.randn(6, 32, dtype=dtype)
    student = teacher.clone().requires_grad_()
    rows = torch.ones(6, dtype=torch.bool)
    assert not torch.autograd.grad(masked_rmse(student, teacher, rows, 1e-12), student)[0].any()
    student = (teacher + 1e-6 * torch.randn_like(teacher)).requires_grad_()
    (gradient,) = torch.autograd.grad(masked_rmse(student, teacher, rows, 1e-12), student)
    assert 0 < gradient.norm() <= 1.001 / math.sqrt(teacher.numel())


def test_bf16_flows_are_compared_in_fp32() -> None:
    complete, missing = flow(6, dtype=torch.bfloat16), flow(6, dtype=torch.bfloat16)
    labels, teacher = torch.randn(6), torch.ones(6, dtype=torch.bool)
    loss, terms = double_flow_loss(complete, missing, labels, teacher, LossSettings())
    exact_complete, exact_missing = (FlowOutput(*(x.double() for x in side)) for side in (complete, missing))
    _, exact_terms = double_flow_loss(exact_complete, exact_missing, labels.double(), teacher, LossSettings())
    assert loss.dtype == torch.float32 and all(term.dtype == torch.float32 for term in terms.values())
    for name in TERMS:
        assert terms[name].item() == pytest.approx(exact_terms[name].item(), rel=1e-5)
