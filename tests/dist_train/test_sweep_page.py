"""The page of a sweep whose points have names and published numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from dist_train import sweep_page
from dist_train.recipe import load_recipe
from slurm.grid import read_grid

TABLE = Path(__file__).parents[2] / "recipes" / "ablation" / "table1.yaml"


def test_the_ablation_beside_the_published_numbers(tmp_path: Path) -> None:
    recipe, points = read_grid(TABLE)
    assert len(points) == 21 and len({point.setting for point in points}) == 7
    rng = np.random.default_rng()
    rows = []
    for point in points:
        load_recipe(recipe, point.overrides)
        row: dict[str, Any] = {
            "point": point.name,
            "setting": point.setting,
            "state": "finished",
            "reason": "",
            "steps": 3,
        }
        row |= {"clips_per_second": 1.0, "world_size": 2, "seed": int(point.values["seed"])}
        row |= {f"test.{part}.mae": float(rng.uniform(1, 2)) for part in ("complete", "missing", "gap", "floor")}
        rows.append({**row, **{f"published.{flow}.mae": value for flow, value in point.published.items()}})
    settings = sweep_page.settings_of(rows, ["seed"], "test")
    assert [(values["setting"], len(found)) for values, found in settings][-1] == ("all", 3)
    figure = sweep_page.draw(rows, ["seed"], "test")
    ours, published = figure.axes
    names = [text.get_text() for text in ours.get_yticklabels()]
    assert names == list(dict.fromkeys(point.setting for point in points))
    drawn = sorted(value for line in published.lines for value in np.asarray(line.get_xdata()).tolist())
    assert drawn == sorted(value for point in points[::3] for value in point.published.values())
    image, page = sweep_page.write_page(tmp_path, rows, ["seed"])
    assert image.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.count(">0.584<") == 3 and len(re.findall(r"<th[ >]", text)) == len(re.findall(r"<td", text)) / 21
