"""What the ranks of the tests of the agreement checks do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.build import build_collator, build_model, fit_to_dataset
from dist_train.global_loss import global_loss, pack
from dist_train.progress import Display
from dist_train.recipe import Recipe
from dist_train.rollout import remember
from dist_train.tokenizer import train_tokenizer
from dist_train.train import Progress, Trainer
from sharding.agreement import every_gradient, same_modules
from sharding.collectives import gather_objects
from sharding.errors import UserError, UserErrors
from sharding.signals import StopFlag
from tests import tiny
from tests.sharding.work_silent_failures import ROWS, WIDTH, Layers
from tests.work import new_run

MOST = 3  # clips per micro-batch


class LeftOut(nn.Module):
    """A layer that some ranks leave out."""

    def __init__(self, inner: nn.Linear, runs: bool) -> None:
        super().__init__()
        self.inner, self.runs = inner, runs

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.runs else x[..., : self.inner.out_features]


def random_recipe(rng: np.random.Generator, audio: str, text: str) -> Recipe:
    """Any way to imagine, hear, read and tune; `audio` and `text` are folders of pretrained models."""
    rollout = str(rng.choice(["prefix", "generate", "cached", "features", "none"]))
    kinds = {"audio": str(rng.choice(["waveform", "features"])), "text": str(rng.choice(["transcript", "features"]))}
    if rollout == "features":
        kinds["text"] = "features"
    tuning = {kind: str(rng.choice(["frozen", "full", "lora"])) for kind in kinds}
    unread = rollout in ("none", "features") and kinds["text"] == "features"
    transcribes = rollout != "none" and kinds["text"] == "transcript" and rng.integers(2) == 1
    return tiny.recipe(
        Path("none"),
        seed=int(rng.integers(2**31)),
        widths={"audio": 7, "text": 6, "simulated": 6, "vision": tiny.VISION_WIDTH},
        simulation={"rollout": rollout, "max_new_tokens": 2 + dist.get_rank()},  # ranks decode other numbers of tokens
        imagination={"enabled": bool(rng.integers(2))},
        audio={"input": kinds["audio"], "pretrained": audio, "config": None, "tuning": tuning["audio"]},
        text={
            "input": kinds["text"],
            "pretrained": None if unread else text,
            "config": None,
            "tuning": tuning["text"],
        },
        loss={"asr": 0.5 if transcribes else 0.0},
    )


def random_clips(rng: np.random.Generator, recipe: Recipe) -> tuple[list[dict[str, Any]], list[list[bool]]]:
    """Up to MOST samples, and for each whether it has audio, text and vision and is real."""
    samples, presence = [], []
    for index in range(int(rng.integers(1, MOST + 1))):
        has = {kind: bool(rng.integers(2)) for kind in ("audio", "text", "vision")}
        clip = {"key": str(index), "index": index, "real": bool(rng.integers(4)), **tiny.clip(rng, **has)}
        if has["audio"] and recipe.audio.input == "features":
            clip["audio"] = rng.normal(size=(rng.integers(1, 30), recipe.widths.audio)).astype(np.float32)
        if has["text"] and recipe.text.input == "features":
            clip["text_features"] = rng.normal(size=(rng.integers(1, 9), recipe.widths.text)).astype(np.float32)
        if has["audio"]:
            clip["simulated"] = rng.normal(size=(rng.integers(1, 9), recipe.widths.simulated)).astype(np.float32)
        samples.append(clip)
        presence.append([*has.values(), clip["real"]])
    return samples, presence


def constructed(folder: Path, seed: int, count: int, audio: str, text: str) -> list[dict[str, Any]]:
    """DoubleFlows of random recipes over clips that differ by rank; for each what the clips had, and what the checks
    said of it and of the same model with a module left out on rank 1.
    """
    shared, own = np.random.default_rng(seed), np.random.default_rng([seed, dist.get_rank()])
    tokenizer = train_tokenizer([" ".join(tiny.WORDS)] * 3, 320)
    found = []
    for _ in range(count):
        recipe = random_recipe(shared, audio, text)
        model = build_model(recipe, tokenizer).train()
        samples, presence = random_clips(own, recipe)
        batch = build_collator(recipe, tokenizer, model)(samples)
        if own.integers(2):  # this rank knows what was said to its clips
            with torch.no_grad():
                remember(batch, model(batch).answers)
        said: list[str | None] = [None, None]
        try:
            with same_modules(model, "step 1"):
                packed = pack(model(batch), batch)
            loss = global_loss([packed], recipe.loss, most=MOST)
            with every_gradient(model, "step 1"):
                loss.surrogate(0, packed).backward()
        except UserError as error:
            said[0] = str(error)
        model.fusion.head = LeftOut(model.fusion.head, runs=dist.get_rank() == 0)  # type: ignore[assignment]
        try:
            with same_modules(model, "step 2"):
                model(batch)
        except UserError as error:
            said[1] = str(error)
        found.append({"recipe": recipe.model_dump(mode="json"), "presence": gather_objects(presence), "said": said})
    return found


def faulty(folder: Path, data: str, stages: list[int]) -> dict[str, list[tuple[str, int]]]:
    """What the trainer tells each rank, after how many steps: of a head that rank 1 leaves out, or (ZeRO-3) of one that
    loses its gradient after the first step.
    """
    found = {}
    for stage in stages:
        recipe = fit_to_dataset(tiny.recipe(Path(data), zero={"stage": stage}, training={"accumulation": 2}))
        trainer = Trainer(recipe, new_run(recipe, folder / str(stage)), resume=False)
        fusion, progress = trainer.engine.module.fusion, trainer.progress
        if stage < 3:
            fusion.head = LeftOut(fusion.head, runs=dist.get_rank() == 0)
        else:

            def detach(_: nn.Module, __: Any, output: Tensor, progress: Progress = progress) -> Tensor:
                return output if progress.step == 0 else output.detach()

            fusion.head.register_forward_hook(detach)
        try:
            with StopFlag() as stop, Display(1, 0, quiet=True) as display:
                trainer.fit(display, stop)
            said = "nothing"
        except (UserError, UserErrors) as error:
            said = str(error)
        found[str(stage)] = gather_objects((said, progress.step))
    return found


def small_differences(folder: Path) -> dict[str, list[str | None]]:
    """What the checks tell each rank of ranks that differ in small ways."""
    rank = dist.get_rank()
    layers, x = Layers(), torch.randn(ROWS, WIDTH)

    def told(check: Any, *actions: Any) -> list[str | None]:
        try:
            with check(layers, "here"):
                for action in actions:
                    action()
        except UserError as error:
            return gather_objects(str(error))
        return gather_objects(None)

    def run(*passes: str) -> Any:
        return lambda: layers(x, passes)

    def learn(*passes: str) -> Any:
        losses = [layers(x, [names]) for names in passes]
        return lambda: [loss.backward() for loss in losses]

    def decode() -> None:
        with torch.no_grad():
            layers(x, ["b c head"] * (rank + 1))

    return {
        "same": told(same_modules, run("stem", "b")),
        "decoding": told(same_modules, decode, run("stem")),
        "more passes": told(same_modules, run(*["stem"] * (2 if rank == 1 else 1))),
        "three ways": told(same_modules, run("stem", ["b", "c", "head"][rank])),
        "same gradients": told(every_gradient, learn("stem b c head")),
        "unused everywhere": told(every_gradient, learn("stem b head")),
        "unused on two": told(every_gradient, learn("stem b c head" if rank == 1 else "stem c head")),
        "other order": told(every_gradient, learn(*(["c head", "stem b"] if rank == 2 else ["stem b", "c head"]))),
    }
