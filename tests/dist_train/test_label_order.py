"""One number for how well similarity follows the label, against scipy; matrices of several runs side by side."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from dist_train.compare import compare
from dist_train.compare_matrices import draw, lines, scaled, shown
from dist_train.compare_page import write_comparison
from dist_train.label_order import average_ranks, by_label, spearman
from tests.dist_train.test_compare import CLIPS, write_run


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_ranks_equal_scipys(values: list[int]) -> None:
    np.testing.assert_allclose(average_ranks(np.array(values)), rankdata(values) - 1)


@pytest.mark.parametrize("nominal", [False, True])
def test_the_correlation_is_over_pairs_of_different_clips(nominal: bool) -> None:
    rng = np.random.default_rng()
    n = int(rng.integers(4, 12))
    label = rng.integers(-3, 4, n) / 3 + 5 * np.eye(n)[0]
    label[-1] = label[-2]  # at least one pair of a class, and one of two
    flows = {name: rng.normal(size=(n, 5)) for name in ("complete", "missing")}
    found = by_label(flows["complete"], flows["missing"], label, nominal=nominal)
    assert found is not None
    pairs = list(permutations(range(n), 2))
    for kind, (a, b) in {"complete": ("complete",) * 2, "missing": ("missing",) * 2, "between": tuple(flows)}.items():
        far = [np.linalg.norm(flows[a][i] - flows[b][j]) for i, j in pairs]
        expected = spearmanr(far, [abs(label[i] - label[j]) for i, j in pairs]).statistic
        if nominal:
            expected = 2 * roc_auc_score([label[i] != label[j] for i, j in pairs], far) - 1
        assert getattr(found, kind) == pytest.approx(expected)
    own = np.mean([np.linalg.norm(flows["complete"][i] - flows["missing"][i]) for i in range(n)])
    assert found.gap == pytest.approx(own / np.mean(far))


def test_ends_of_the_scale() -> None:
    label = np.random.default_rng().normal(size=9)
    line = label[:, None] * np.ones(3)
    found = by_label(line, line, label, nominal=False)
    assert found is not None and found[:3] == pytest.approx((1, 1, 1)) and found.gap == 0
    assert (
        by_label(line, line, np.ones(9), nominal=False) is None
        and by_label(line[:2], line[:2], label[:2], nominal=False) is None
    )
    assert by_label(np.ones((9, 3)), line, label, nominal=False) is None
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def written(path: Path, label: np.ndarray, *, noise: float, seed: int, extra: float = 0.0) -> dict[str, np.ndarray]:
    """A run with representations of its first 20 clips."""
    rng = np.random.default_rng()
    write_run(path, label, noise, seed=seed, extra=extra)
    tensors = {flow: label[:20, None] + rng.normal(scale=noise, size=(20, 4)) for flow in ("complete", "missing")}
    tensors = {name: (values * 10**extra).astype(np.float32) for name, values in tensors.items()}
    save_file({**tensors, "label": label[:20].astype(np.float32)}, path / "representations_test.safetensors")
    return tensors


def test_settings_side_by_side_on_one_scale(tmp_path: Path) -> None:
    label = np.random.default_rng().uniform(-3, 3, CLIPS).round(3)
    first = [written(tmp_path / f"good,seed={seed}", label, noise=0.3, seed=seed) for seed in (0, 1)]
    second = written(tmp_path / "bad", label, noise=3.0, seed=0, extra=2.0)
    write_run(tmp_path / "none", label, 0.5, seed=0, extra=0.5)  # has no representations
    runs = [tmp_path / name for name in ("good,seed=0", "good,seed=1", "bad", "none")]
    found, page = write_comparison(runs, None)
    rows = shown(found)
    assert [row.setting.name for row in rows] == ["good", "bad"]
    assert found.settings[2].label_order == [] and "1 further settings are not drawn" in page.read_text()
    for one, tensors in zip(found.settings[0].label_order, first, strict=True):
        expected = by_label(tensors["complete"], tensors["missing"], label[:20].astype(np.float32), nominal=False)
        assert expected is not None and tuple(one) == pytest.approx(tuple(expected), abs=1e-5)
    good, bad = (row.setting.label_order[0] for row in rows)
    assert good.between > bad.between
    images = [axes.images[0] for axes in draw(rows).axes if axes.images]
    assert len({image.get_clim() for image in images[:6]}) == 1
    order = sorted(range(20), key=lambda clip: label[clip])
    for image, tensors in zip(images[2:6:3], (first[0], second), strict=True):
        own = [np.linalg.norm(a - b) for a, b in permutations(tensors["complete"], 2)]
        matrix = [[np.linalg.norm(tensors["complete"][i] - tensors["missing"][j]) for j in order] for i in order]
        np.testing.assert_allclose(np.asarray(image.get_array()), np.array(matrix) / np.mean(own), rtol=1e-4)
    assert "±" in lines(rows)[0][1] and "±" not in lines(rows)[1][1]
    assert (tmp_path / "comparison_similarity.png").is_file()


def test_runs_without_representations_have_no_matrices(tmp_path: Path) -> None:
    label = np.linspace(-3, 3, CLIPS).round(3)
    for name in ("a", "b"):
        write_run(tmp_path / name, label, 0.5, seed=0)
    found, page = write_comparison([tmp_path / "a", tmp_path / "b"], None)
    assert not shown(found) and "Similarity ordered by label" not in page.read_text()
    assert not (tmp_path / "comparison_similarity.png").exists()


def test_runs_of_other_clips_are_not_put_beside_each_other(tmp_path: Path) -> None:
    label = np.random.default_rng().uniform(-3, 3, CLIPS).round(3)
    written(tmp_path / "a", label, noise=0.3, seed=0)
    written(tmp_path / "b", label, noise=0.3, seed=0, extra=1.0)
    tensors = {flow: np.random.default_rng().normal(size=(9, 4)).astype(np.float32) for flow in ("complete", "missing")}
    save_file({**tensors, "label": np.arange(9, dtype=np.float32)}, tmp_path / "b" / "representations_test.safetensors")
    rows = shown(compare([tmp_path / "a", tmp_path / "b"]))
    assert [row.setting.name for row in rows] == ["a"]
    diagonal = scaled(rows[0].found)["complete"]
    assert np.trace(diagonal) == 0 and diagonal[~np.eye(20, dtype=bool)].mean() == pytest.approx(1)
