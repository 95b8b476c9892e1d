"""Progress on the terminal of rank 0."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_train.task import Measure


class Display:
    """A progress bar with loss, clips/s and time left, and a line per validation. A quiet one shows nothing."""

    def __init__(self, total_steps: int, done: int, *, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(quiet=quiet)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=done, loss="", speed="")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def step(self, step: int, loss: float, clips_per_second: float) -> None:
        """After each optimizer step."""
        self.bar.update(self.task, completed=step, loss=f"loss {loss:.3f}", speed=f"{clips_per_second:.0f} clips/s")

    def validation(self, epoch: int, scores: dict[str, Any], better: bool, measure: Measure) -> None:
        """After each validation."""
        complete, missing, floor = (scores[part][measure.main] for part in ("complete", "missing", "floor"))
        spoken = scores.get("transcription")
        self.console.print(
            f"epoch {epoch}: validation {measure.title} complete {complete:.3f}, missing flow {missing:.3f} "
            f"(floor {floor:.3f})"
            + (f", transcript {spoken['nats_per_token']:.3f} nats/token" if spoken else "")
            + (", best so far" if better else "")
        )
