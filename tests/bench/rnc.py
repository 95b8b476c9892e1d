"""Rank-N-Contrast: the sorted form against the loop over columns, forward and backward, side by side in one run.

    python tests/bench/rnc.py [--clips 512] [--rounds 3]

The loop is the obvious implementation: all pairwise differences, then for each of the N - 1 columns a mask of the rows'
negatives, a masked sum of exponentials, a logarithm. Prints the best time of each, their ratio and the differences in
value and gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dist_train.losses import RNC_SLACK, rank_n_contrast

TEMPERATURE = 2.0
FEATURES = 64
# CMU-MOSEI has 27 distinct training labels in [-3, 3], so ties are heavy.
DISTINCT_LABELS = 27


def column_loop(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    n = len(features)
    similarity = -(features[:, None] - features[None, :]).norm(dim=-1) / temperature
    similarity = similarity - similarity.max(dim=1, keepdim=True).values.detach()
    others = ~torch.eye(n, dtype=torch.bool, device=features.device)
    similarity = similarity[others].view(n, n - 1)
    distance = (labels[:, None] - labels[None, :]).abs()[others].view(n, n - 1)
    exponential = similarity.exp()
    loss = features.new_zeros(())
    for k in range(n - 1):
        negatives = (distance >= distance[:, k, None] - RNC_SLACK).to(features.dtype)
        shares = similarity[:, k] - (negatives * exponential).sum(1).log()
        loss = loss - shares.sum() / (n * (n - 1))
    return loss


def timed(
    loss: Callable[[Tensor, Tensor, float], Tensor], features: Tensor, labels: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Seconds, value and gradient of one forward and backward pass."""
    features = features.clone().requires_grad_()
    start = time.perf_counter()
    value = loss(features, labels, TEMPERATURE)
    (gradient,) = torch.autograd.grad(value, features)
    return time.perf_counter() - start, value.detach(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=512, help="clips in the global batch; rows are twice as many")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the best of each side counts")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    features = torch.randn(2 * arguments.clips, FEATURES)
    levels = torch.linspace(-3, 3, DISTINCT_LABELS)
    labels = levels[torch.randint(DISTINCT_LABELS, (arguments.clips,))].repeat(2)

    timed(rank_n_contrast, features, labels)  # the first call pays for allocation
    ours, loop = float("inf"), float("inf")
    for _ in range(arguments.rounds):
        seconds, value, gradient = timed(rank_n_contrast, features, labels)
        ours = min(ours, seconds)
        seconds, loop_value, loop_gradient = timed(column_loop, features, labels)
        loop = min(loop, seconds)
    error = ((gradient - loop_gradient).norm() / loop_gradient.norm()).item()
    print(f"clips {arguments.clips}, rows {2 * arguments.clips}, {torch.get_num_threads()} threads")
    print(f"sorted {ours:.3f} s   column loop {loop:.3f} s   ratio {loop / ours:.1f}x")
    print(f"value {value.item():.7f} and {loop_value.item():.7f}   relative gradient difference {error:.1e}")


if __name__ == "__main__":
    main()
