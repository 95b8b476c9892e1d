"""What the ranks of tests of the language model do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_train.batch import Batch
from dist_train.build import build_collator, build_model, fit_to_dataset, open_split, prepare_tokenizer, to_device
from dist_train.global_loss import global_loss, pack
from dist_train.llm import load_tokenizer
from dist_train.model import DoubleFlow
from dist_train.optimizer import build_optimizer
from dist_train.rollout import RolloutCache, remember
from sharding.collectives import device, gather_objects
from sharding.zero import build_engine
from tests import tiny

# Positions in the split that each rank gets in each step. Clips of an odd index are heard by both ranks in turn.
STEPS = [((5, 7, 9), (0, 1, 2)), ((7, 5, 9), (4, 6, 8)), ((0, 4, 6), (5, 7, 9)), ((8, 1, 2), (9, 6, 5))]
EPOCHS = [0, 1, 2, 2]  # of those steps; one generation


def rollouts(folder: Path, data: str, rollout: str) -> dict[str, Any]:
    """Four optimizer steps under ZeRO-0 and ZeRO-3: loss and answers of each step, by rank."""
    recipe = tiny.recipe(
        Path(data), simulation={"rollout": rollout, "max_new_tokens": 9, "refresh_epochs": 3}, training={"epochs": 3}
    )
    recipe = fit_to_dataset(recipe)
    if dist.get_rank() == 0:
        prepare_tokenizer(recipe, folder / "tokenizer")
    dist.barrier()
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    split = open_split(recipe, "train")
    found = {}
    for stage in (0, 3):
        model = build_model(recipe, tokenizer)
        torch.manual_seed(5)
        for parameter in model.llm.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.4)
        collate = build_collator(recipe, tokenizer, model)
        batches = [
            to_device(collate([{**split[index], "real": True} for index in places[dist.get_rank()]]), device())
            for places in STEPS
        ]
        model.llm.eos = ending(model, batches[0])
        engine = build_engine(
            model.to(device()),
            build_optimizer(recipe.optimizer, model.parameters()),
            recipe.zero.model_copy(update={"stage": stage}),
            micro_batch=3,
            accumulation=1,
            clip_norm=0.0,
            bf16=False,
        )
        cache = RolloutCache("data", recipe.simulation.refresh_epochs) if rollout == "cached" else None
        found[str(stage)] = gather_objects(train(engine, batches, cache, recipe.loss))
    return found


def ending(model: DoubleFlow, batch: Batch) -> int:
    """A token, the same on both ranks, that ends the first answers of one rank sooner than those of the other."""
    model.llm.eos = -1
    answers = model.eval()(batch).answers
    assert answers is not None
    first, second = ([row.tolist() for row in ids] for ids in gather_objects(answers.ids))

    def longest(rows: list[list[int]], token: int) -> int:
        return max(row.index(token) + 1 if token in row else len(row) for row in rows)

    return max(
        {token for row in first + second for token in row},
        key=lambda t: (abs(longest(first, t) - longest(second, t)), t),
    )


def train(engine: Any, batches: list[Any], cache: RolloutCache | None, settings: Any) -> list[dict[str, Any]]:
    """One step per batch; a batch is run twice, as exact accumulation does, the second time without decoding."""
    rows = []
    decoded: list[bool] = []
    generate = engine.module.llm.causal.generate

    def counted(**inputs: Any) -> Any:
        decoded.append(True)
        return generate(**inputs)

    engine.module.llm.causal.generate = counted
    engine.train()
    epoch = -1
    for step, batch in enumerate(batches):
        if cache is not None:
            if EPOCHS[step] != epoch:
                epoch = EPOCHS[step]
                cache.begin_epoch(epoch)
            cache.fill(batch, epoch)
        with torch.no_grad():
            look = engine(batch)
        remember(batch, look.answers)
        if cache is not None:
            cache.store(batch)
        row: dict[str, Any] = {"decoded": bool(decoded)}
        decoded.clear()
        packed = pack(engine(batch), batch)
        assert not decoded
        assert torch.equal(packed.rows[:, :-1].isfinite(), torch.ones_like(packed.rows[:, :-1], dtype=torch.bool))
        loss = global_loss([packed], settings)
        engine.backward(loss.surrogate(0, packed))
        engine.step()
        row["loss"] = float(loss.loss)
        row["answers"] = [ids[mask].tolist() for ids, mask in zip(batch["answer"], batch["answer_mask"], strict=True)]
        rows.append(row)
    return rows


def asr(folder: Path, data: str) -> dict[str, float]:
    """ASR of unequal clips on two ranks: loss, and distance of the averaged gradient from that of all clips at once."""
    six = dict.fromkeys(("mse_complete", "mse_missing", "mkd1", "mkd2", "rs", "rnc"), 0.0)
    recipe = fit_to_dataset(tiny.recipe(Path(data), loss={**six, "asr": 1.0}, training={"select_on": "transcription"}))
    if dist.get_rank() == 0:
        prepare_tokenizer(recipe, folder / "tokenizer")
    dist.barrier()
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    model, split = build_model(recipe, tokenizer).train(), open_split(recipe, "train")
    collate = build_collator(recipe, tokenizer, model)
    parts = [(1, 4, 5), (2, 3, 7)]  # on rank 0 one clip of three lacks its transcript, on rank 1 another its audio

    def batch(indices: tuple[int, ...]) -> Any:
        return to_device(collate([{**split[index], "real": True} for index in indices]), device())

    here = batch(parts[dist.get_rank()])
    packed = pack(model.to(device())(here), here)
    loss = global_loss([packed], recipe.loss)
    loss.surrogate(0, packed).backward()
    averaged = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            averaged.append(parameter.grad.flatten() / dist.get_world_size())
    model.zero_grad()
    whole = model(batch(parts[0] + parts[1])).asr
    assert whole is not None
    expected = whole[:, 0].sum() / whole[:, 1].sum()
    expected.backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    distance = (torch.cat(averaged) - wanted).norm() / wanted.norm()
    counts = gather_objects(float(packed.rows[:, -6].sum()))
    return {
        "loss": float(loss.loss),
        "expected": float(expected),
        "distance": float(distance),
        "apart": len(set(counts)),
    }
