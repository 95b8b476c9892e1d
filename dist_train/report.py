"""One self-contained page about a run: numbers, figures, recipe. Reads the run directory, changes nothing it reads."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from dist_train import class_figures, figures, representation_figures, robustness_figures
from dist_train.figures import Plot
from dist_train.names import FLOWS, MODALITIES
from dist_train.report_clips import RULES, cards
from dist_train.run_directory import refuse_links
from dist_train.run_record import SPLITS, Run, number, read_run
from dist_train.task import MEASURES
from sharding.errors import UserError, plain

# arXiv 2410.15029, Table II: CMU-MOSEI test MAE. Other corpora have other labels and are not comparable.
MOSEI_PUBLISHED = {"complete": 0.506, "missing": 0.550}
MOST_NAMES = 40  # of loss terms, phases and parts of memory that are drawn; a run has up to 15


def write_report(run: Path) -> Path:
    """Write `run/report.html` and `run/figures/*.png`; return the page's path.

    A file that is absent or damaged is named on the page; what is there is shown.

    Raises:
        UserError: `run` is not a run directory, or cannot be written to.
    """
    record = read_run(run)
    refuse_links(run)
    plots = list(plan_plots(record))
    try:
        (run / "figures").mkdir(exist_ok=True)
        shown = []
        for plot in plots:
            image = ""
            if plot.draw is not None:
                png = figures.render(plot.draw)
                (run / "figures" / f"{plot.name}.png").write_bytes(png)
                image = "data:image/png;base64," + base64.b64encode(png).decode()
            shown.append({"title": plot.title, "caption": plot.caption, "image": image})
        page = run / "report.html"
        page.write_text(_template().render(_context(record), plots=shown), encoding="utf-8")
    except OSError as error:
        raise UserError(
            str(run), f"the report cannot be written ({error.strerror})", "Free or allow the place."
        ) from None
    return page


def plan_plots(run: Run) -> Iterator[Plot]:
    """The figures of the page in order, each bound to its data."""
    evaluated = [record for record in run.evals if record.get("split") == "valid"]
    yield _plot_validation(run, evaluated)
    yield from representation_figures.plots(run)
    yield from _plots_predictions(run)
    yield from _plots_robustness(run)
    absent = "No training step was logged."
    step = run.column("step")
    named = [name for name in dict.fromkeys(k for r in run.steps for k in r) if name.startswith("loss")]
    terms = {_label(name): run.column(name) for name in named[:MOST_NAMES]}
    terms = {name: values for name, values in terms.items() if np.isfinite(values).any()}
    yield Plot(
        "losses",
        "Loss terms",
        "Unweighted terms. Pale: each logged step. Solid: moving average." if terms else absent,
        partial(figures.losses, step, terms) if terms else None,
    )
    yield Plot(
        "schedule",
        "Learning rate and gradient norm",
        "The norm is of all trainable parameters, before clipping." if run.steps else absent,
        partial(figures.schedule, step, run.column("lr"), run.column("grad_norm")) if run.steps else None,
    )
    seconds = np.nan_to_num(run.column("step_seconds"))
    timed = bool((seconds > 0).any())
    yield Plot(
        "throughput",
        "Throughput and waiting",
        "Clips of all ranks per second of step time, and the share of that time spent waiting for the next batch."
        if timed
        else absent,
        partial(figures.throughput, *_pace(run, seconds)) if timed else None,
    )
    parts = _numbers(_get(run.summary, "speed"), "phase_seconds")
    if parts and sum(parts.values()) > 0:
        yield Plot(
            "phases",
            "Where a step's time goes",
            "Mean over the run on rank 0. Forward runs twice in all micro-steps but one; rollout decodes text.",
            partial(figures.phases, parts),
        )
    peak = np.nan_to_num(run.column("peak_bytes"))
    if (peak > 0).any():
        yield Plot(
            "memory",
            "Peak memory",
            "Of rank 0: GPU memory, or that of the process on a CPU.",
            partial(figures.memory, step, peak),
        )
    yield from _plots_plan(run)


def _plots_robustness(run: Run) -> Iterator[Plot]:
    """What `dist-train evaluate --robustness` found, if it was run."""
    found = run.robustness
    if found is None:
        return
    measure = MEASURES[found.kind]
    floor = found.floor[measure.main] or 0.0
    about = f"{found.clips} clips of the {found.split} split."
    yield Plot(
        "missing_rates",
        "When clips lack a modality",
        f"{about} A share of the clips lacks it, the others have everything; mean of {found.draws} draws.",
        partial(robustness_figures.missing_rates, found.missing_rate, floor, measure),
    )
    yield Plot(
        "patterns",
        "What is there",
        f"{about} No clip has more than what is named. {said_of_text(run)}",
        partial(robustness_figures.patterns, found.patterns, floor, measure),
    )
    lacks = _get(run.recipe, "missing") or "text"
    left = "+".join(name for name in MODALITIES if name != lacks)
    clean = {"complete": found.patterns["+".join(MODALITIES)].value(measure.main), "missing": math.nan}
    if lacks in MODALITIES:  # of `random` no pattern is the flow without noise
        clean["missing"] = found.patterns[left].value(measure.main)
    yield Plot(
        "noise",
        "When a modality is noisy",
        f"{about} Gaussian noise of each clip's own root mean square, in place of some steps, or on top of all."
        + (" In the missing flow, noise in text is noise in the imagined text." if imagines_text(run) else ""),
        partial(robustness_figures.noise, found.noise, clean, floor, measure),
    )
    if found.values:
        yield Plot(
            "values",
            "What the refinement thinks of each modality",
            f"{about} Means over clips, complete flow: values in (0, 1), and the gate, which is 1 where it is neutral.",
            partial(robustness_figures.values, found.values, MODALITIES),
        )


def imagines_text(run: Run) -> bool:
    """Whether the missing flow reads text that a language model imagined."""
    return _get(run.recipe, "simulation", "rollout") != "none"


def said_of_text(run: Run) -> str:
    """What stands in for text where a pattern has none."""
    if imagines_text(run):
        return "Where text is not, the model imagines it from the audio."
    if _get(run.recipe, "imagination", "kind") == "cmpt":
        return "What is not there, proxy tokens in the other modalities stand for."
    return "Where text is not, no text is imagined."


def _plots_plan(run: Run) -> Iterator[Plot]:
    """Foretold beside measured, if the run has a plan and one of its steps was measured."""
    measured = _get(run.plan, "measured")
    parts = {name: size for name, size in _numbers(measured, "foretold_peak_parts").items() if size > 0}
    peak, foretold = number(_get(measured, "peak_bytes")), number(_get(measured, "foretold_peak_bytes"))
    if not parts or not peak > 0 or math.isnan(foretold):
        return
    sent, wire = (sum(_numbers(measured, key).values()) for key in ("wire_bytes", "foretold_wire_bytes"))
    exchange = (
        f" Given to collectives: foretold {wire / 1e6:,.1f} MB, measured {sent / 1e6:,.1f} MB." if sent > 0 else ""
    )
    yield Plot(
        "planned_memory",
        "Memory foretold and measured",
        f"Step {_show(number(_get(measured, 'step')), '.0f')}: foretold is {foretold / peak:.1%} of what was measured."
        + exchange,
        partial(figures.planned_memory, parts, peak),
    )


def _plot_validation(run: Run, records: list[dict[str, Any]]) -> Plot:
    measure = MEASURES[run.task.kind]
    title = f"Validation {measure.title} of both flows"
    reached = {flow: np.array([number(_get(r, flow, measure.main)) for r in records]) for flow in FLOWS}
    reached = {flow: values for flow, values in reached.items() if np.isfinite(values).any()}
    if not reached:
        return Plot("validation", title, "No validation was logged.", None)
    floors = [value for r in records if math.isfinite(value := number(_get(r, "floor", measure.main)))]
    caption = f"{measure.title} on the validation split; the dashed floor always answers {measure.answer}."
    published = MOSEI_PUBLISHED if run.is_mosei and measure.main == "mae" else {}
    if published:
        caption += (
            " Dotted: published test results on MOSEI (arXiv 2410.15029), which selected the epoch on the test set."
        )
    best = number(run.summary.get("best_step"))
    draw = partial(
        figures.validation,
        np.array([number(record.get("step")) for record in records]),
        reached,
        floor=floors[-1] if floors else None,
        best_step=int(best) if math.isfinite(best) else None,
        published=published,
        axis=measure.axis,
    )
    return Plot("validation", title, caption, draw)


def _plots_predictions(run: Run) -> Iterator[Plot]:
    titles = {"scatter": "Prediction against label", "error_by_label": "Error by label"}
    if run.task.classifies:
        titles = {"confusion": "What is taken for what", "recall": "How much of each class is found"}
    if run.predictions is None or bool(run.predictions.classes) != run.task.classifies:
        for name, title in titles.items():
            yield Plot(name, title, "No predictions were written.", None)
        return
    split, label, flows = run.predictions[:3]
    about = f"{len(label)} clips of the {split} split."
    if run.predictions.classes:
        drawn = label, flows, run.predictions.classes
        counts = " Numbers: clips. Colour: their share of the clips with the label."
        yield Plot("confusion", titles["confusion"], about + counts, partial(class_figures.confusions, *drawn))
        whiskers = " Recall; whiskers: 95 % interval. Classes without clips are left out."
        yield Plot("recall", titles["recall"], about + whiskers, partial(class_figures.recall, *drawn))
        return
    jitter = " Dashed: prediction equals label. Points of tied labels are spread sideways a little."
    yield Plot("scatter", titles["scatter"], about + jitter, partial(figures.scatter, label, flows))
    bars = " Whiskers: 95 % interval of the mean."
    yield Plot("error_by_label", titles["error_by_label"], about + bars, partial(figures.error_by_label, label, flows))


def _pace(run: Run, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(training time, clips/s, share of waiting) per logged step. `samples` counts from the start of the run."""
    step, samples = run.column("step"), run.column("samples")
    passed = np.diff(step, prepend=0.0 if step[0] > 0 else np.nan)
    clips = np.diff(samples, prepend=0.0) / np.where(passed > 0, passed, np.nan)
    if step[0] > 1:  # resumed or logged rarely: the first record alone does not tell its own step's clips
        clips[0] = np.nan
    usual = ~(run.column("measured") > 0)  # the step measured for plan.json was slower
    safe = np.where((seconds > 0) & usual, seconds, np.nan)
    waiting = np.clip(run.column("data_seconds") / safe, 0, 1)
    return np.cumsum(seconds * np.nan_to_num(passed, nan=1.0)), clips / safe, waiting


def _context(run: Run) -> dict[str, Any]:
    """What the template shows beside the figures."""
    split, results = next(((s, run.summary[s]) for s in SPLITS if isinstance(run.summary.get(s), dict)), ("", {}))
    when = ""
    if not results and run.evals:
        results, split = run.evals[-1], str(run.evals[-1].get("split"))
        when = f" after step {_show(number(results.get('step')), ',.0f')}"
    rows = []
    measure = MEASURES[run.task.kind]
    shown: dict[tuple[str, ...], tuple[str, str]] = {(key,): told for key, told in measure.names.items()}
    if run.task.classifies and isinstance(_get(results, "recall", "complete"), dict):
        shown |= {("recall", name): (f"Recall, {name}", "share of its clips") for name in run.task.classes[:MOST_NAMES]}
    for key, (name, hint) in shown.items():
        complete, missing = (number(_get(results, *key[:-1], flow, key[-1])) for flow in FLOWS)
        gap = number(_get(results, "gap", key[-1])) if len(key) == 1 else math.nan
        cells = [
            complete,
            missing,
            missing - complete if math.isnan(gap) else gap,
            number(_get(results, "floor", key[-1])) if len(key) == 1 else math.nan,
        ]
        if any(map(math.isfinite, cells)):
            signed = [_show(cells[2], "+.3f") if k == 2 else _show(cell, ".3f") for k, cell in enumerate(cells)]
            rows.append({"name": name, "hint": hint, "cells": signed})
    reached = {flow: number(_get(results, flow, measure.main)) for flow in FLOWS}
    floor = number(_get(results, "floor", measure.main))
    tiles = [
        (flow, _show(value, ".3f"), _show(value / floor, ".2f") if floor > 0 else "") for flow, value in reached.items()
    ]
    summary = run.summary
    facts = {
        "Steps": _show(number(run.steps[-1].get("step")), ",.0f") if run.steps else "",
        "Selected step": summary.get("best_step"),
        "Clips trained on": _show(number(summary.get("samples")), ",.0f", ""),
        "Ranks": summary.get("world_size"),
        "Training time": _duration(number(summary.get("seconds"))),
        "Clips per second": _show(number(_get(summary, "speed", "clips_per_second")), ",.1f", ""),
        "LLM tokens per second": _show(number(_get(summary, "speed", "tokens_per_second")), ",.0f", ""),
        "MFU": _show(number(_get(summary, "speed", "mfu")), ".1%", ""),
        "In collectives": _show(number(_get(summary, "speed", "exchange_share")), ".1%", ""),
        "Audio padding": _show(number(_get(summary, "speed", "padding_share")), ".0%", ""),
        "Seed": summary.get("seed"),
        "Set aside": f"{summary['set_aside']} bad samples" if summary.get("set_aside") else "",
    }
    notes = summary.get("notes")
    return {
        "name": run.path.resolve().name,
        "split": split,
        "when": when,
        "selected_on": summary.get("selected_on"),
        "selected_flow": summary.get("selected_flow"),
        "measure": measure,
        "tiles": tiles,
        "floor": _show(floor, ".3f", ""),
        "rows": rows,
        "facts": {name: str(value) for name, value in facts.items() if value not in (None, "")},
        "notes": [str(note) for note in notes] if isinstance(notes, list) else [],
        "problems": run.problems,
        "clips": cards(run),
        "rules": RULES,
        "recipe": {section: " · ".join(_leaves(content)) for section, content in run.recipe.items()},
        "recipe_text": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        "environment_text": yaml.safe_dump(run.environment, sort_keys=False, allow_unicode=True)
        if run.environment
        else "",
        "flow_colours": figures.FLOW_COLOURS,
        "flow_names": figures.FLOW_NAMES,
    }


def _leaves(content: Any) -> Iterator[str]:
    """The settings of one section of the recipe that were set: `key value`, nested sections left to the full text."""
    if not isinstance(content, dict):
        yield str(content)
        return
    for key, value in content.items():
        if value is not None and not isinstance(value, dict):
            shown = " ".join(str(value).split())
            yield f"{key} {shown if len(shown) <= 60 else shown[:59] + '…'}"


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("dist_train", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2")


def _get(record: Any, *keys: str) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _numbers(record: Any, key: str) -> dict[str, float]:
    """A mapping of names to finite numbers; what is none is left out."""
    found = _get(record, key)
    pairs = list(found.items())[:MOST_NAMES] if isinstance(found, dict) else []
    values = {_label(str(name)): number(value) for name, value in pairs}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _label(name: str) -> str:
    """A name out of a file as text of a figure: matplotlib reads what stands between dollars as TeX."""
    return plain(name).replace("$", r"\$")


def _show(value: float, form: str, absent: str = "–") -> str:
    return format(value, form).replace("-", "−") if math.isfinite(value) else absent


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"
