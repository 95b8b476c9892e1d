"""The loop: one engine, one forward and one backward over both flows per micro-step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from dist_train.build import (
    build_collator,
    build_model,
    build_training,
    kept_tokenizer,
    open_split,
    training_plan,
)
from dist_train.costs import clip_costs
from dist_train.evaluate import evaluate_checkpoint, find_checkpoint, judged, predict, same_bases, score
from dist_train.foresight import MEASURED, Foresight, grid
from dist_train.idle import idle_parts
from dist_train.notes import shortcomings
from dist_train.parameter_table import parameter_rows, parameter_table, write_parameters
from dist_train.phases import Phases, measured
from dist_train.progress import Display
from dist_train.recipe import Recipe
from dist_train.rollout import RolloutCache
from dist_train.run_directory import RunDirectory
from dist_train.run_state import Progress, RunState, check_bases, read_run_state
from dist_train.speed import peak_bytes, read_steps, speed
from dist_train.step import Stepper, StepResult
from dist_train.task import MEASURES
from sharding import checkpoint
from sharding.agreement import Agreement
from sharding.census import Census
from sharding.collectives import any_rank, gather_objects, together
from sharding.engine_state import adam
from sharding.errors import UserError
from sharding.exchange_time import Exchanged, ExchangeTimer, Waits
from sharding.heartbeat import beat
from sharding.order import EpochPlan
from sharding.portable import Portable
from sharding.saver import Saver
from sharding.signals import StopFlag
from sharding.stream import stream
from sharding.watchdog import Watchdog

CENSUS_STEPS = 5  # optimizer steps within which every trainable must have had a gradient that is not zero


class Trainer:
    """Everything one rank holds during training.

    Args:
        recipe: resolved recipe.
        run: its directory; the tokenizer is there already.
        resume: continue from the last checkpoint.
        accept_other_base: even if it was trained on other frozen weights.

    Raises:
        UserError, UserErrors: data, models or the checkpoint do not fit.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, *, resume: bool, accept_other_base: bool = False) -> None:
        self.recipe, self.run = recipe, run
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.train_split, self.valid_split = open_split(recipe, "train"), open_split(recipe, "valid")
        self.costs, self.valid_costs = clip_costs(recipe, self.train_split), clip_costs(recipe, self.valid_split)
        tokenizer = kept_tokenizer(recipe, run.tokenizer)
        nodes, per_node = grid()
        self.foresight = (
            Foresight(recipe, tokenizer, self.train_split, nodes, per_node, run.plan) if self.rank == 0 else None
        )
        last = Portable(find_checkpoint(run, "last"), checksums=False) if resume and run.saved else None
        model = build_model(recipe, tokenizer, resumed=last is not None)
        self.collate = build_collator(recipe, tokenizer, model)
        self.phases, self.exchange, self.waits = Phases(), ExchangeTimer(), Waits()
        self.ended: float | None = None  # when the last step did, if nothing but bookkeeping followed
        self.rollouts = (
            RolloutCache(self.train_split.info.content_hash, recipe.simulation.refresh_epochs)
            if recipe.simulation.rollout == "cached"
            else None
        )
        self.bases = same_bases(checkpoint.fingerprints(model))
        self.progress = Progress()
        if last is not None:
            state = read_run_state(last)
            if not accept_other_base:
                check_bases(last.directory, state.bases, self.bases)
            checkpoint.load_weights(model, last)
        self.engine = build_training(
            recipe,
            model,
            micro_batch=max(map(max, self.plan(0).rows(0))),
            accumulation=max(recipe.training.accumulation, 2 if self.costs else 1),
        )
        if last is not None:
            checkpoint.load(self.engine, last)
            if self.rank == 0 and state.world_size != self.world:
                Console().print(
                    f"Note: saved by {state.world_size} ranks, continued by {self.world}: the same clips in the "
                    "same order, but other draws of dropout and other rounding, so other losses."
                )
            self.progress = state.progress
            if not (run.checkpoints / "best").exists():  # none yet, or it was damaged
                self.progress.forget_best()
            if self.rollouts is not None and state.rollouts is not None:
                self.rollouts.restore(state.rollouts)
            if self.rank == 0:
                run.rewind(self.progress.step)
        best = self.progress.best_step
        self.saver = Saver(run.checkpoints, recipe.checkpoint, {} if best is None else {"best": best})

        self.started = started = self.progress.step
        self.peak = 0
        self.stepper = Stepper(
            self.engine,
            recipe.loss,
            exact=recipe.training.accumulated_loss == "exact",
            keys=self.train_split.keys,
            seed=recipe.seed,
            agreement=Agreement(self.engine.module, started + recipe.training.check_agreement_steps),
            census=Census(
                self.engine.module,
                steps=started + CENSUS_STEPS,
                # A unit may have died since the run began, where everything has learnt: no reason not to go on.
                excused={"": "it has learnt"} if started else idle_parts(recipe, self.train_split),
            ),
            rollouts=self.rollouts,
            missing=recipe.missing,
        )

    def plan(self, epoch: int) -> EpochPlan:
        """Order and cut of an epoch."""
        return training_plan(self.recipe, self.train_split.sources, self.world, epoch, self.costs)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.recipe.training.epochs * self.plan(0).steps

    def fit(self, display: Display, stop: StopFlag) -> bool:
        """Trains to the end, to early stopping, or to a requested stop. Returns whether it was stopped by request.

        Raises:
            UserError: bad input, or a loss or gradient that is not finite.
        """
        stopped = self.loop(display, stop)
        self.saver.finish()
        self.note(self.waits.tell())
        return stopped

    def loop(self, display: Display, stop: StopFlag) -> bool:
        """`fit`, but for a checkpoint that may still be written at the end."""
        progress = self.progress
        while progress.epoch < self.recipe.training.epochs:
            plan = self.plan(progress.epoch)
            for _ in self.steps(plan, display):
                ended = progress.epoch_step == plan.steps
                if ended:
                    progress.epoch, progress.epoch_step = progress.epoch + 1, 0
                self.saver.poll()
                stopped = any_rank(stop.raised)
                if self.validation_due(ended):
                    self.validate(display)
                elif stopped or self.recipe.checkpoint.due(progress.step):
                    self.save()
                if stopped:
                    return True
                patience = self.recipe.training.patience
                if patience is not None and progress.validations_since_best >= patience:
                    return False
        return False

    def steps(self, plan: EpochPlan, display: Display) -> Any:
        """Makes the optimizer steps of an epoch that are left, yielding after each."""
        progress, self.ended = self.progress, None
        if self.rollouts is not None:
            self.rollouts.begin_epoch(progress.epoch)
        batches = stream(
            self.train_split,
            plan,
            self.rank,
            self.collate,
            start_step=progress.epoch_step,
            workers=self.recipe.data.workers,
            pin_memory=torch.cuda.is_available(),
        )
        for epoch_step in range(progress.epoch_step, plan.steps):
            started, waited = time.perf_counter(), 0.0
            since: float | None = None if self.ended is None else started - self.ended
            beat("data", progress.step)

            def next_batch() -> Any:
                nonlocal waited
                before = time.perf_counter()
                batch = together(lambda: next(batches))
                waited += time.perf_counter() - before
                progress.set_aside += batch.pop("set_aside")
                return batch

            rate = self.learning_rate(progress.step, progress.epoch)
            measures = progress.step + 1 == self.started + MEASURED
            with measured(self.phases), self.exchange, self.observed(measures):
                result = self.step(next_batch, plan, epoch_step, rate)
            phases, exchanged = self.phases.read(), self.exchange.read()
            self.ended = time.perf_counter()
            seconds = self.ended - started
            self.peak = max(self.peak, peak_bytes())
            progress.step += 1
            progress.epoch_step += 1
            progress.samples += len(plan.batch(epoch_step))
            progress.seconds += seconds
            if self.foresight is not None:
                self.run.log(
                    {
                        "kind": "step",
                        "step": progress.step,
                        "total_steps": self.total_steps,
                        "epoch": progress.epoch,
                        "samples": progress.samples,
                        "loss": result.loss if result.clips else None,  # none where all were set aside
                        **{f"loss/{name}": value for name, value in result.terms.items()},
                        "lr": rate,
                        "grad_norm": result.grad_norm,
                        "tokens": result.tokens,
                        "micro_steps": result.micro_steps,
                        **self.foresight.arithmetic(plan, epoch_step, result.passages, seconds),
                        "clips": len(plan.batch(epoch_step)),
                        "padding_share": result.padded_positions / max(result.audio_positions, 1),
                        "phases": phases,
                        "step_seconds": seconds,
                        "data_seconds": waited,
                        "exchange_seconds": sum(exchanged),  # in collectives, waiting for other ranks included
                        "between_seconds": since,  # bookkeeping after the step before; null if more was done
                        "world_size": self.world,
                        "peak_bytes": self.peak,
                        "measured": measures,  # for plan.json: slower than others
                    }
                )
                self.foresight.compare(plan, epoch_step, progress.step)
            if measures:  # followed by a comparison
                self.ended = None
            elif progress.step > self.started + MEASURED:
                self.note(self.waits.add(exchanged))
            display.step(progress.step, result.loss, len(plan.batch(epoch_step)) / seconds)
            yield

    def note(self, exchanged: Exchanged | None) -> None:
        """Puts into plan.json how the time in collectives divides."""
        if exchanged is not None and self.foresight is not None:
            self.foresight.exchange(exchanged)
            self.ended = None

    def learning_rate(self, step: int, epoch: int) -> float:
        """Learning rate of the next step."""
        recipe = self.recipe
        return recipe.optimizer.learning_rate * recipe.schedule.factor(step, epoch, self.total_steps)

    def step(self, next_batch: Callable[[], Any], plan: EpochPlan, epoch_step: int, rate: float) -> StepResult:
        """One optimizer step."""
        for group in adam(self.engine).param_groups:
            group["lr"] = rate
        progress = self.progress
        rows, clips = plan.rows(epoch_step), len(plan.batch(epoch_step))
        return self.stepper.run(next_batch, rows, clips, step=progress.step, epoch=progress.epoch)

    @contextmanager
    def observed(self, measures: bool) -> Iterator[None]:
        """On rank 0, measures one step for plan.json, and traces the one that `training.profile_step` names."""
        number = self.progress.step + 1
        with ExitStack() as stack:
            if self.foresight is not None and measures:
                stack.enter_context(self.foresight.metered())
            if self.rank == 0 and number == self.recipe.training.profile_step:
                trace = str(self.run.path / f"trace_step_{number}.json.gz")
                stack.enter_context(
                    torch.profiler.profile(
                        profile_memory=True, on_trace_ready=lambda done: done.export_chrome_trace(trace)
                    )
                )
            yield

    def validation_due(self, epoch_ended: bool) -> bool:
        """Whether to validate after the step just made; always after the last one."""
        every = self.recipe.training.validate_every
        last = epoch_ended and self.progress.epoch == self.recipe.training.epochs
        return last or (epoch_ended if every == "epoch" else self.progress.step % every == 0)

    def validate(self, display: Display) -> None:
        """Evaluates on the validation split, keeps count of the best, and saves (collective)."""
        progress, recipe = self.progress, self.recipe
        began = time.perf_counter()
        self.ended = None
        self.engine.eval()
        predictions = predict(
            self.engine,
            self.valid_split,
            self.collate,
            batch=recipe.data.evaluation_batch,
            workers=recipe.data.workers,
            costs=self.valid_costs,
        )
        scores = score(predictions, self.train_split.labels, recipe.task)
        found = judged(scores, recipe.training.select_on, recipe.task)
        better = progress.best_score is None or found < progress.best_score
        progress.validations_since_best = 0 if better else progress.validations_since_best + 1
        if better:
            progress.best_step, progress.best_score = progress.step, found
        if self.rank == 0:
            row = {"kind": "eval", "step": progress.step, "epoch": progress.epoch, "split": "valid"}
            row["seconds"] = time.perf_counter() - began
            self.run.log({**row, **{part: value for part, value in scores.items() if part != "gap"}})
        self.save(*(("best",) if better else ()))
        display.validation(progress.epoch, scores, better, MEASURES[recipe.task.kind])

    def check_clips_left(self) -> None:
        """Refuses to save what was trained on nothing.

        Raises:
            UserError: every training clip was set aside.
        """
        aside = self.progress.set_aside
        if len(aside) == len(self.train_split):
            raise UserError(
                "split train",
                f"has no clip that could be used: all {len(aside)} were set aside, first {aside[0]}",
                "Raise the limit that is named, or mend the shards.",
            )

    def save(self, *pointers: str) -> None:
        """Saves a checkpoint, which these pointers will name too (collective)."""
        self.ended = None
        every = gather_objects(self.progress.set_aside)
        self.progress.set_aside = sorted({problem for part in every for problem in part})
        together(self.check_clips_left)
        state = RunState(
            run_id=self.run.id,
            progress=self.progress,
            seed=self.recipe.seed,
            world_size=self.world,
            zero_stage=self.recipe.zero.stage,
            bases=self.bases,
            content_hash=self.train_split.info.content_hash,
            rollouts=None if self.rollouts is None else self.rollouts.state(),
        )
        self.saver.save(self.engine, self.progress.step, state.model_dump(mode="json"), pointers)


def train(
    recipe: Recipe,
    run: RunDirectory,
    *,
    resume: bool,
    accept_other_base: bool = False,
    watchdog: Watchdog | None = None,
    stop: StopFlag,
) -> bool:
    """One rank's part of a run: training, then the test split with the best checkpoint. Returns False if stopped by
    request (collective).
    """
    trainer = Trainer(recipe, run, resume=resume, accept_other_base=accept_other_base)
    if watchdog is not None:
        watchdog.watch(trainer.engine.module)
    if trainer.rank == 0:
        rows = parameter_rows(trainer.engine.module)
        write_parameters(rows, run.parameters)
        Console().print(parameter_table(rows))
    with Display(trainer.total_steps, trainer.progress.step, quiet=trainer.rank != 0) as display:
        stopped = trainer.fit(display, stop)
    progress, world = trainer.progress, trainer.world
    train_split, foresight = trainer.train_split, trainer.foresight
    if stopped:
        return False
    del trainer  # its memory is needed by the evaluation
    beat("loading")
    best = find_checkpoint(run, "best")
    names = [name for name in train_split.info.splits if name != "train"]
    # What it was trained on was looked at when it was resumed.
    labels = train_split.labels
    splits: dict[str, Any] = {
        name: evaluate_checkpoint(run, recipe, best, name, accept_other_base=True, train_labels=labels)
        for name in names
    }
    if foresight is not None:
        pace = speed(read_steps(run.metrics))
        summary = {
            "best_step": progress.best_step,
            "selected_on": "valid",
            "selected_flow": recipe.training.select_on,
            **splits,
            "world_size": world,
            "zero_stage": recipe.zero.stage,
            "steps": progress.step,
            "epochs": progress.epoch,
            "samples": progress.samples,
            "seconds": round(progress.seconds, 1),
            "seed": recipe.seed,
            "set_aside": len(progress.set_aside),
            "speed": pace,
            "notes": shortcomings(recipe, train_split, progress.set_aside, splits),
        }
        run.summary.write_text(json.dumps(summary, indent=1))
        foresight.close(pace)
    return True
