"""The plane of representations and VGMR's values, against what they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_train.figures import Plot
from dist_train.representation_figures import Plane, neighbours, plane, plots, refinement, representations
from dist_train.run_record import Representations, Run, read_run


def made(run: Run) -> dict[str, Plot]:
    return {plot.name: plot for plot in plots(run)}


def test_the_plane_holds_the_most_variance() -> None:
    rng = np.random.default_rng()
    n, d = int(rng.integers(5, 30)), int(rng.integers(3, 12))
    complete, missing = rng.normal(size=(2, n, d)) * rng.uniform(0.1, 3, d)
    found = plane({"complete": complete, "missing": missing})
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
    near = {flow: rng.normal(size=(7, 2)) for flow in points}
    panels = representations(Plane(points, np.array([0.5, 0.25]), 1.0, 1.0), near, label).axes
    for axes, expected in zip(panels, (points, near), strict=False):
        joined = np.asarray(axes.lines[0].get_xydata()).reshape(7, 3, 2)
        for number, (flow, marks) in enumerate(zip(expected, axes.collections, strict=True)):
            np.testing.assert_allclose(np.asarray(marks.get_offsets()), expected[flow])
            np.testing.assert_allclose(np.asarray(marks.get_array()), label)
            np.testing.assert_allclose(joined[:, number], expected[flow])
        assert np.isnan(joined[:, 2]).all()
        assert len(axes.collections[0].get_paths()[0]) != len(axes.collections[1].get_paths()[0])
    assert "50 %" in panels[0].get_xlabel() and "25 %" in panels[0].get_ylabel()


def test_tsne_keeps_clusters_together_and_is_the_same_again() -> None:
    rng = np.random.default_rng()
    centres = rng.normal(size=(3, 20)) * 30
    which = np.arange(30) % 3
    sets = {name: centres[which] + rng.normal(size=(30, 20)) for name in ("real", "imagined")}
    found = neighbours(sets)
    assert found is not None and found.keys() == sets.keys()
    points, kinds = np.concatenate(list(found.values())), np.tile(which, 2)
    apart = np.linalg.norm(points[:, None] - points, axis=2) + np.diag(np.full(60, np.inf))
    assert (kinds[apart.argmin(1)] == kinds).all()
    again = neighbours({name: points * 1e30 for name, points in sets.items()})  # of any size
    assert again is not None and np.isfinite(np.concatenate(list(again.values()))).all()
    assert np.array_equal(found["real"], (neighbours(sets) or {})["real"])
    assert neighbours({name: np.ones((30, 4)) for name in sets}) is None
    assert neighbours({name: points[:5] for name, points in sets.items()}) is None


def test_a_report_without_scikit_learn_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.representation_figures.has_tsne", lambda: False)
    points = np.random.default_rng().normal(size=(20, 4))
    run = Run(Path("run"), representations=Representations("test", points, points, np.arange(20), {}))
    plot = made(run)["representations"]
    assert "pip install 'dist-train[figures]'" in plot.caption and "perplexity" not in plot.caption
    assert plot.draw is not None and len([axes for axes in plot.draw().axes if axes.lines]) == 1


def test_what_is_imagined_stands_beside_what_it_imagines() -> None:
    rng = np.random.default_rng()
    flow = rng.normal(size=(20, 4))
    real, incoming, dreamt = rng.normal(size=(3, 20, 6))
    lacks = np.where(np.arange(20) < 4, -1, 1)

    def shown(*stand_in: np.ndarray) -> Plot | None:
        points = np.stack(stand_in, 1)
        found = Representations("test", flow, flow, np.arange(20), {}, points, lacks)
        return made(Run(Path("run"), representations=found)).get("imagined")

    plot = shown(real, incoming, dreamt)
    assert plot is not None and plot.draw is not None and "text of 16 clips" in plot.caption
    distance = np.linalg.norm(real[4:] - dreamt[4:], axis=1).mean()
    assert f"own clip's real vector {distance:.3g}" in plot.caption and "MIA-1" in plot.caption
    assert len(plot.draw().axes[0].collections) == 3
    same = shown(real, dreamt, dreamt)
    assert same is not None and same.draw is not None and len(same.draw().axes[0].collections) == 2
    constant = np.where(np.arange(20) < 10, 1.0, 2.0)[:, None] * np.ones_like(real)
    constant += rng.normal(size=real.shape) * 1e-7  # rounding
    lacks = np.where(np.arange(20) < 10, 0, 1)  # a zero step for each of two modalities: nothing is imagined,
    assert shown(real, constant, constant) is None
    proxies = shown(real, constant, dreamt)  # or, with proxies, nothing comes in
    assert proxies is not None and proxies.draw is not None and len(proxies.draw().axes[0].collections) == 2
    assert "audio or text of 20 clips" in proxies.caption and "MIA" not in proxies.caption


@pytest.mark.parametrize("damage", ["shape", "lacks", "nan", "one"])
def test_what_is_imagined_is_drawn_only_where_it_fits(damage: str, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    tensors = {flow: rng.normal(size=(5, 4)).astype(np.float32) for flow in ("complete", "missing")}
    tensors |= {"label": np.arange(5, dtype=np.float32), "lacks": np.ones(5, np.float32)}
    tensors["stand_in"] = rng.normal(size=(5, 3, 4)).astype(np.float32)
    if damage == "shape":
        tensors["stand_in"] = tensors["stand_in"][:, :2].copy()
    elif damage == "lacks":
        tensors["lacks"][2] = 3
    elif damage == "nan":
        tensors["stand_in"][0, 0, 0] = np.nan
    else:
        del tensors["lacks"]
    save_file(tensors, tmp_path / "representations_test.safetensors")
    (tmp_path / "summary.json").write_text("{}")
    run = read_run(tmp_path)
    assert any("imagined" in problem for problem in run.problems) and "imagined" not in made(run)
    assert made(run)["representations"].draw is not None


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
