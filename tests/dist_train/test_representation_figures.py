"""The plane of representations and VGMR's values, against what they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_train.figures import Plot
from dist_train.representation_figures import plane, plots, refinement, representations
from dist_train.run_record import Representations, Run, read_run


def made(run: Run) -> dict[str, Plot]:
    return {plot.name: plot for plot in plots(run)}


def test_the_plane_holds_the_most_variance() -> None:
    rng = np.random.default_rng()
    n, d = int(rng.integers(5, 30)), int(rng.integers(3, 12))
    complete, missing = rng.normal(size=(2, n, d)) * rng.uniform(0.1, 3, d)
    found = plane(complete, missing)
    both = np.concatenate([complete, missing])
    values, vectors = np.linalg.eigh(np.cov(both.T, bias=True))
    np.testing.assert_allclose(found.explained, values[::-1][:2] / values.sum())
    shown = np.concatenate(list(found.points.values()))
    expected = (both - both.mean(0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(shown), np.abs(expected), atol=1e-9)
    assert found.apart == pytest.approx(
        np.mean([np.linalg.norm(a - b) for a, b in zip(complete, missing, strict=True)])
    )
    assert found.spread == pytest.approx(np.sqrt(values.sum()))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (2, 3)])
@pytest.mark.parametrize("alike", [True, False])
def test_few_or_equal_points_are_drawn_too(shape: tuple[int, int], alike: bool) -> None:
    rng = np.random.default_rng()
    complete = np.ones(shape) if alike else rng.normal(size=shape)
    run = Run(Path("run"), representations=Representations("test", complete, complete, np.ones(shape[0]), {}))
    plot = made(run)["representations"]
    assert plot.draw is not None and "nan" not in plot.caption
    plot.draw()


def test_colour_is_the_label_shape_the_flow_and_lines_join_pairs() -> None:
    rng = np.random.default_rng()
    points = {flow: rng.normal(size=(7, 2)) for flow in ("complete", "missing")}
    label = rng.uniform(-3, 3, 7)
    axes = representations(points, np.array([0.5, 0.25]), label).axes[0]
    joined = np.asarray(axes.lines[0].get_xydata()).reshape(7, 3, 2)
    for number, (flow, marks) in enumerate(zip(points, axes.collections, strict=True)):
        np.testing.assert_allclose(np.asarray(marks.get_offsets()), points[flow])
        np.testing.assert_allclose(np.asarray(marks.get_array()), label)
        np.testing.assert_allclose(joined[:, number], points[flow])
    assert np.isnan(joined[:, 2]).all()
    assert len(axes.collections[0].get_paths()[0]) != len(axes.collections[1].get_paths()[0])
    assert "50 %" in axes.get_xlabel() and "25 %" in axes.get_ylabel()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_values_are_ordered_by_label_on_one_scale(k: int) -> None:
    rng = np.random.default_rng()
    refined = {flow: rng.uniform(size=(6, 3, k)).astype(np.float32) for flow in ("complete", "missing")}
    label = rng.normal(size=6)
    images = [axes.images[0] for axes in refinement(refined, label).axes[: 2 * k]]
    order = sorted(range(6), key=lambda clip: label[clip])
    for number in range(k):
        for flow, image in zip(refined, images[2 * number : 2 * number + 2], strict=True):
            expected = [[refined[flow][clip, modality, number] for clip in order] for modality in range(3)]
            np.testing.assert_allclose(np.asarray(image.get_array()), expected)
        assert images[2 * number].get_clim() == images[2 * number + 1].get_clim()


@pytest.mark.parametrize("shape", [(5, 3, 3), (5, 3, 1), (5, 2, 3), (4, 3, 3), (5, 3, 4), (5, 3, 0), (5,)])
@pytest.mark.parametrize("value", [0.5, np.nan])
def test_only_values_that_fit_are_drawn(tmp_path: Path, shape: tuple[int, ...], value: float) -> None:
    rng = np.random.default_rng()
    tensors = {flow: rng.normal(size=(5, 4)).astype(np.float32) for flow in ("complete", "missing")}
    tensors |= {f"refine_{flow}": np.full(shape, value, np.float32) for flow in tensors}
    tensors["label"] = np.arange(5, dtype=np.float32)
    save_file(tensors, tmp_path / "representations_test.safetensors")
    (tmp_path / "summary.json").write_text("{}")
    run = read_run(tmp_path)
    fits = shape in ((5, 3, 3), (5, 3, 1)) and value == 0.5
    assert ("refinement" in made(run)) is fits
    assert any("VGMR" in problem for problem in run.problems) is not fits
    assert made(run)["representations"].draw is not None
