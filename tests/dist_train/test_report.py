"""The report shows what a run directory holds, survives what it lacks, and asks nothing of the network."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dist_train import figures
from dist_train.names import FLOWS
from dist_train.report import plan_plots, write_report
from dist_train.run_record import Run, read_run
from sharding.errors import UserError

TERMS = ["mse_complete", "mse_missing", "mkd1", "mkd2", "rs", "rnc"]
FILES = ["recipe.yaml", "environment.json", "plan.json", "metrics.jsonl", "summary.json"]
FILES += ["predictions_test.csv", "representations_test.safetensors"]
METRICS = ["mae", "corr", "acc2_nonzero", "acc2_has0", "f1_nonzero", "f1_has0", "acc7"]


def step_record(rng: np.random.Generator, step: int, **changes: Any) -> dict[str, Any]:
    terms = {f"loss/{name}": float(rng.uniform(0.1, 3)) for name in TERMS}
    timing = {"step_seconds": float(rng.uniform(0.1, 1)), "data_seconds": float(rng.uniform(0, 0.1)), "peak_bytes": 0}
    record = {"kind": "step", "step": step, "epoch": step // 5, "samples": 16 * step, "loss": sum(terms.values())}
    return {**record, **terms, "lr": 1e-4, "grad_norm": float(rng.uniform(0.5, 5)), "tokens": 99, **timing, **changes}


def metrics(rng: np.random.Generator) -> dict[str, float]:
    return {name: float(rng.uniform(0.2, 0.9)) for name in METRICS}


def make_run(path: Path, rng: np.random.Generator, steps: int = 12, data: str = "demo") -> dict[str, Any]:
    """A complete run directory with random content; returns its summary."""
    path.mkdir(parents=True)
    n = int(rng.integers(30, 60))
    (path / "recipe.yaml").write_text(f"seed: 1\ndata: {{path: {data}, batch: 16}}\nlosses: {{rnc: 0.5}}\n")
    (path / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    lines = [step_record(rng, step) for step in range(1, steps + 1)]
    lines += [
        {
            "kind": "eval",
            "step": step,
            "split": "valid",
            "complete": metrics(rng),
            "missing": metrics(rng),
            "floor": {"mae": 1.0},
        }
        for step in range(4, steps + 1, 4)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (path / "predictions_test.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "label", "complete", "missing", "has_audio", "has_text", "has_vision"])
        rows.writerows([f"clip{k}", *rng.uniform(-3, 3, 3), 1, 0, 1] for k in range(n))
    tensors = {flow: rng.normal(size=(n, 128)).astype(np.float32) for flow in ("complete", "missing")}
    save_file({**tensors, "label": rng.uniform(-3, 3, n).astype(np.float32)}, path / "representations_test.safetensors")
    test = {"complete": metrics(rng), "missing": metrics(rng), "gap": {}, "floor": {"mae": 1.1}}
    summary = {"best_step": 8, "selected_on": "valid", "selected_flow": "mean", "test": test, "valid": test}
    summary |= {"world_size": 2, "samples": 16 * steps, "seconds": 75.0, "seed": 1, "notes": [], "set_aside": 0}
    phases = {"data": 0.1, "forward": 0.5, "rollout": 0.0, "backward": 0.9}
    summary["speed"] = {"clips_per_second": 71.25, "padding_share": 0.31, "phase_seconds": phases, "mfu": 0.412}
    parts = {"frozen weights": 3.1 * 2**30, "activations of llm": 2.0 * 2**30, "buckets": 0}
    measured = {"step": 3, "peak_bytes": 5.0 * 2**30, "foretold_peak_bytes": 5.1 * 2**30, "foretold_peak_parts": parts}
    measured |= {"wire_bytes": {"all_reduce": 2_000_000}, "foretold_wire_bytes": {"all_reduce": 2_100_000}}
    (path / "plan.json").write_text(json.dumps({"measured": measured}))
    (path / "summary.json").write_text(json.dumps(summary))
    return summary


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out where a test is about the page."""
    monkeypatch.setattr(figures, "render", lambda draw: b"png")


@pytest.fixture
def sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the figures, but leave out layout and pixels, which take nearly all the time."""

    def build(draw: figures.Draw) -> bytes:
        draw()
        return b"png"

    monkeypatch.setattr(figures, "render", build)


def test_complete_run_on_one_self_contained_page(tmp_path: Path, rng: np.random.Generator) -> None:
    summary = make_run(tmp_path / "run", rng)
    page = write_report(tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    text = page.read_text()
    for address in re.findall(r"""(?:src|srcset|href)\s*=\s*["']([^"']*)|url\(([^)]*)""", text):
        assert "".join(address).startswith("data:image/png;base64,"), address
    assert not re.search(r"<(script|link|iframe)|@import", text)
    for flow in ("complete", "missing"):
        for value in summary["test"][flow].values():
            assert f"{value:.3f}" in text
    gap = summary["test"]["missing"]["mae"] - summary["test"]["complete"]["mae"]
    assert f"{gap:+.3f}".replace("-", "−") in text
    assert "selected on the <strong>valid</strong> split" in text
    assert "Not drawn" not in text
    drawn = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert drawn == {
        "validation",
        "losses",
        "similarity",
        "representations",
        "scatter",
        "error_by_label",
        "schedule",
        "throughput",
        "phases",
        "planned_memory",
    }
    assert "foretold is 102.0% of what was measured" in text and "41.2%" in text
    for path in (tmp_path / "run" / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_text_is_escaped(tmp_path: Path, rng: np.random.Generator, quick: None) -> None:
    summary = make_run(tmp_path / "run", rng, data="'<img src=x onerror=1>'")
    summary["notes"] = ["<script>alert(1)</script>"]
    summary["set_aside"] = 7
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    text = write_report(tmp_path / "run").read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;img" in text
    assert not re.search(r"<script|<img src=x", text)
    assert "7 bad samples" in text


def test_interrupted_run_draws_what_is_there(tmp_path: Path, rng: np.random.Generator, sketch: None) -> None:
    run = tmp_path / "run"
    make_run(run, rng, steps=5)
    for name in ("summary.json", "predictions_test.csv", "representations_test.safetensors", "environment.json"):
        (run / name).unlink()
    damaged = int(rng.integers(2, 9))
    with (run / "metrics.jsonl").open("ab") as file:
        for line in rng.choice([b'{"kind": "step", "st', b"[]", b"\xff\xfe", b'{"kind": "step"}', b"17"], damaged):
            file.write(line + b"\n\n")
    text = write_report(run).read_text()
    assert "No summary.json" in text
    assert f"{damaged} damaged lines skipped" in text
    assert "Results on the valid split after step 4" in text
    assert text.count("No predictions were written") == 2
    assert (run / "figures" / "losses.png").is_file()


def test_one_record_of_one_step_is_drawn(tmp_path: Path, rng: np.random.Generator, sketch: None) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step_record(rng, 1, peak_bytes=2**30, grad_norm=None)) + "\n")
    write_report(tmp_path)
    assert (tmp_path / "figures" / "memory.png").is_file()
    assert not (tmp_path / "figures" / "validation.png").exists()


def test_the_step_measured_for_the_plan_is_left_out_of_the_pace(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = [step_record(rng, step, step_seconds=9.0 if step == 3 else 0.5, measured=step == 3) for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (plot,) = (plot for plot in plan_plots(read_run(tmp_path)) if plot.name == "throughput")
    assert plot.draw is not None
    _, pace, waiting = plot.draw.args  # type: ignore[attr-defined]
    assert np.flatnonzero(np.isnan(pace)).tolist() == [2] == np.flatnonzero(np.isnan(waiting)).tolist()


def test_resumed_run_counts_each_step_once(tmp_path: Path, rng: np.random.Generator) -> None:
    first = [step_record(rng, step) for step in range(1, 9)]
    again = [step_record(rng, step) for step in range(6, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first + again))
    run = read_run(tmp_path)
    assert [record["step"] for record in run.steps] == list(range(1, 11))
    assert run.steps[6] == again[1]
    plot = next(plot for plot in plan_plots(run) if plot.name == "throughput")
    seconds, clips, waiting = plot.draw.args  # type: ignore[union-attr]
    times = np.array([record["step_seconds"] for record in first[:5] + again])
    waits = np.array([record["data_seconds"] for record in first[:5] + again])
    np.testing.assert_allclose(clips, 16 / times)
    np.testing.assert_allclose(waiting, waits / times)
    np.testing.assert_allclose(seconds[-1], times.sum())


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/data/CMU-MOSEI/shards", True),
        ("shards/mosei_v2", True),
        ("cmumosei", True),
        ("mfn_mmmo", False),
        ("moseity", False),
    ],
)
def test_published_lines_only_on_mosei(tmp_path: Path, rng: np.random.Generator, path: str, named: bool) -> None:
    make_run(tmp_path / "run", rng, data=path)
    plot = next(plot for plot in plan_plots(read_run(tmp_path / "run")) if plot.name == "validation")
    figure = plot.draw()  # type: ignore[misc]
    labels = [str(line.get_label()) for line in figure.axes[0].lines]
    assert any("MOSEI, published" in label for label in labels) is named
    assert ("MOSEI" in plot.caption) is named
    assert any("floor" in label for label in labels)


@pytest.mark.parametrize("what", ["absent", "file", "empty"])
def test_not_a_run_directory(tmp_path: Path, what: str) -> None:
    path = tmp_path / "run"
    if what == "file":
        path.write_text("")
    elif what == "empty":
        path.mkdir()
    with pytest.raises(UserError) as error:
        write_report(path)
    assert error.value.where == str(path)


def test_place_that_cannot_be_written_is_a_users_error(tmp_path: Path, rng: np.random.Generator, quick: None) -> None:
    make_run(tmp_path / "run", rng)
    (tmp_path / "run" / "figures").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "run")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES),
    content=st.one_of(
        st.binary(max_size=60),
        st.sampled_from([b"", b"{}", b"[1]", b"null", b'{"test": 3, "best_step": "x", "notes": 1, "seconds": []}']),
        st.sampled_from([b"label,complete\n1,2\n", b"label,complete,missing\nx,1,2\n", b'{"kind":"step","step":"3"}']),
    ),
)
def test_damaged_file_never_raises(
    tmp_path_factory: pytest.TempPathFactory, quick: None, name: str, content: bytes
) -> None:
    run = tmp_path_factory.mktemp("damage") / "run"
    make_run(run, np.random.default_rng(0))
    (run / name).write_bytes(content)
    assert "</html>" in write_report(run).read_text()


def test_similarity_is_ordered_by_label_on_one_scale(rng: np.random.Generator) -> None:
    n = int(rng.integers(3, 20))
    complete, missing, label = rng.normal(size=(n, 8)), rng.normal(size=(n, 8)), rng.normal(size=n)
    figure = figures.similarity(complete, missing, label)
    order = sorted(range(n), key=lambda k: label[k])
    images = [axes.images[0] for axes in figure.axes[:2]]
    for image, other in zip(images, (complete, missing), strict=True):
        expected = [[np.linalg.norm(complete[i] - other[j]) for j in order] for i in order]
        np.testing.assert_allclose(np.asarray(image.get_array()), expected, atol=1e-9)
    assert images[0].get_clim() == images[1].get_clim()


def test_smooth_is_a_moving_average_that_ignores_gaps(rng: np.random.Generator) -> None:
    values = rng.normal(size=int(rng.integers(1, 200)))
    values[rng.random(len(values)) < 0.2] = np.nan
    half = len(values) // 40
    for k, smoothed in enumerate(figures.smooth(values)):
        window = values[max(0, k - half) : k + half + 1]
        window = window[np.isfinite(window)]
        np.testing.assert_allclose(smoothed, window.mean() if len(window) else np.nan)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=50), st.booleans())
@settings(deadline=None)
def test_every_label_has_a_bin(labels: list[float], other_range: bool) -> None:
    label = np.array(labels) * (10 if other_range else 1)
    edges = figures.bin_edges(label)
    assert (np.diff(edges) >= 0).all()
    assert edges[0] <= label.min() + 1e-9
    assert edges[-1] >= label.max() - 1e-9
    assert len(edges) <= 8


def test_error_bars_equal_the_errors_of_each_bin(rng: np.random.Generator) -> None:
    label = rng.uniform(-3, 3, 300)
    flows = {flow: rng.uniform(-3, 3, 300) for flow in FLOWS}
    figure = figures.error_by_label(label, flows)
    bars = [bar.get_height() for bar in figure.axes[0].patches]  # type: ignore[attr-defined]
    expected = [
        np.mean([abs(p - y) for p, y in zip(values, label, strict=True) if np.floor(y + 0.5) == centre])
        for values in flows.values()
        for centre in range(-3, 4)
    ]
    np.testing.assert_allclose(bars, expected)


def test_run_without_recipe_is_not_mosei() -> None:
    assert not Run(Path("mosei")).is_mosei
