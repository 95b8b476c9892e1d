"""Rollouts: the text a model imagines from the audio, decoded without gradient, and kept where the recipe says so."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dist_train.missing import TEXT
from dist_train.packed import TextStates, Tokens
from sharding.collectives import any_rank, gather_objects

PAPER_PROMPT = (
    "USER: Transcribe speech to text. Output the transcription directly without redundant content. "
    "Ensure that the output is not duplicated. \n ASSISTANT:"
)


class SimulationSettings(BaseModel):
    """How the language model imagines the text of a clip whose transcript is missing."""

    model_config = ConfigDict(extra="forbid")

    rollout: Literal["generate", "cached", "prefix", "features", "none"] = Field(
        "generate",
        description="`generate`: decoding, then one differentiable pass, states of the answer. "
        "`cached`: the same, but in training a clip's answer is kept and decoded anew every `refresh_epochs` epochs. "
        "`prefix`: no decoding, states at the audio positions. `features`: KEY.simulated.npy, extracted before "
        "(`dist-train extract`). `none`: no imagined text.",
    )
    refresh_epochs: int = Field(5, ge=1, description="Rollout `cached`: epochs for which an answer is kept.")
    beams: int = Field(1, ge=1, description="Beams of the decoding; 1 = greedy (SDUMC decodes with 4).")
    layer: int = Field(-4, description="Index into the language model's hidden_states for the imagined text.")
    max_new_tokens: int = Field(200, ge=1, description="Longest answer, in tokens.")
    prompt: str = Field(PAPER_PROMPT, description="Prompt after the audio.")
    stack_frames: int = Field(5, ge=1, description="Audio frames stacked into one language model position.")
    projector_width: int = Field(2048, ge=1, description="Hidden width of the projector.")
    projector: str | None = Field(
        None,
        description="Weights the projector starts from: the run directory of a projector pre-training "
        "(recipes/slam_asr.yaml), a checkpoint of it, or SLAM-LLM's model.pt or pytorch_model.bin. Default: random.",
    )

    @property
    def imagines(self) -> bool:
        """Whether the language model imagines text while the clip is read."""
        return self.rollout in ("generate", "cached", "prefix")

    @property
    def decodes(self) -> bool:
        """Whether answers are decoded at all."""
        return self.rollout in ("generate", "cached")


@torch.no_grad()
def decode(causal: Any, prefix: TextStates, *, beams: int, limit: int, eos: int, pad: int) -> Tokens:
    """Answers of at most `limit` tokens to embedded prefixes [B, L, H], by greedy or beam search with a KV cache.

    Under ZeRO-3 all ranks must call it, each with at least one row; their answers may differ in length.

    Returns:
        The best answer of each row, its EOS included where it has one.
    """
    # Decoding wants padding on the left.
    order = torch.argsort(prefix.mask.to(torch.int8), dim=1, stable=True)
    embeds = torch.gather(prefix.states, 1, order[..., None].expand_as(prefix.states))
    with evaluating(causal):
        ids = causal.generate(
            inputs_embeds=embeds,
            attention_mask=torch.gather(prefix.mask, 1, order).long(),
            do_sample=False,
            num_beams=beams,
            max_new_tokens=limit,
            eos_token_id=eos,
            pad_token_id=pad,
            synced_gpus=sharded(causal),
        )
    ends = ids == eos
    return Tokens(ids, ends.cumsum(1) - ends.long() == 0)


def answer(
    wanted: Tensor, known: Tokens | None, ask: Callable[[Tensor], Tokens], *, everywhere: bool, filler: int
) -> Tokens:
    """One answer per row: the known one, or a decoded one where it is wanted.

    Args:
        wanted: bool [B], rows whose answer matters. Another row gets one token.
        known: answers at hand; a row without a token has none.
        ask: decodes the rows [n] it is given, n >= 1.
        everywhere: if any rank decodes, all do, on a row whose answer is dropped if need be (ZeRO-3 gathers weights
            from all ranks). Collective then.
        filler: id of that one token, and behind an answer's end.
    """
    rows = len(wanted)
    if known is None:
        known = Tokens(wanted.new_zeros(rows, 0, dtype=torch.long), wanted.new_zeros(rows, 0))
    todo = (wanted & ~known.mask.any(1)).nonzero().squeeze(1)
    found = None
    if any_rank(len(todo) > 0) if everywhere else len(todo) > 0:
        found = ask(todo if len(todo) else todo.new_zeros(1))
    width = max(1, known.ids.shape[1], 0 if found is None else found.ids.shape[1])
    ids = known.ids.new_full((rows, width), filler)
    mask = known.mask.new_zeros(rows, width)
    parts = [(torch.arange(rows, device=ids.device), known)]
    if found is not None and len(todo):
        parts.append((todo, found))
    for place, said in parts:
        columns = said.ids.shape[1]
        ids[place, :columns] = torch.where(said.mask, said.ids, filler)
        mask[place, :columns] = said.mask
    mask[:, 0] = True
    return Tokens(ids, mask)


def sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model's parameters in parts."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no activation checkpointing, which has no KV cache) for the length of the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class RolloutCache:
    """Answer tokens of the training clips (rollout `cached`), kept for some epochs.

    All answers are of one generation, `epoch // refresh_epochs`; a new one drops them all, so none is older than the
    recipe allows. A clip visits another rank in each epoch: the ranks exchange what they decoded when an epoch begins.

    Args:
        identity: of the training data (its content hash): answers belong to positions in it.
        refresh_epochs: epochs for which an answer is kept.
    """

    def __init__(self, identity: str, refresh_epochs: int) -> None:
        self.identity, self.refresh_epochs = identity, refresh_epochs
        self.generation: int | None = None  # of the answers held
        self._answers: dict[int, np.ndarray] = {}  # index in the split → int32 token ids; the same on all ranks
        self._fresh: dict[int, np.ndarray] = {}  # decoded here since the last exchange

    def __len__(self) -> int:
        return len(self._answers.keys() | self._fresh.keys())

    def begin_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch, and of a resumed one: shares the answers, or drops stale ones
        (collective).
        """
        if epoch // self.refresh_epochs == self.generation:
            self.gather()
            return
        self.generation = epoch // self.refresh_epochs
        self._answers, self._fresh = {}, {}

    def fill(self, batch: Any, epoch: int) -> None:
        """Puts the known answers of a training batch's clips into it (`Batch.answer`), on the device it is on.

        Raises:
            RuntimeError: `begin_epoch` was not called for this epoch, so answers could be stale.
        """
        if epoch // self.refresh_epochs != self.generation:
            raise RuntimeError(
                f"the answers are of generation {self.generation}, epoch {epoch} needs begin_epoch first"
            )
        found = [self._find(index) for index in batch["index"].tolist()]
        lengths = torch.tensor([len(tokens) for tokens in found])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros_like(mask, dtype=torch.long)
        ids[mask] = torch.from_numpy(np.concatenate(found)).long()
        device = batch["index"].device
        batch["answer"], batch["answer_mask"] = ids.to(device), mask.to(device)

    def _find(self, index: int) -> np.ndarray:
        nothing = np.empty(0, np.int32)
        return self._fresh.get(index, self._answers.get(index, nothing))

    def store(self, batch: Any) -> None:
        """Keeps the answers that the model gave to the clips of a batch (`remember` put them there)."""
        rows = (batch["audio_present"] & batch["real"] & batch["dropped"][:, TEXT]).tolist()
        for index, real, ids, mask in zip(
            batch["index"].tolist(), rows, batch["answer"].tolist(), batch["answer_mask"].tolist(), strict=True
        ):
            if real and index not in self._answers:
                self._fresh[index] = np.array(ids[: sum(mask)], np.int32)

    def gather(self) -> None:
        """Gives all ranks what each has decoded (collective)."""
        for part in gather_objects(packed_answers(self._fresh.items())):
            self._answers.update(unpacked_answers(*part))
        self._fresh = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON-able, about 3 bytes per token (collective)."""
        self.gather()
        file = io.BytesIO()
        np.savez_compressed(file, *packed_answers(sorted(self._answers.items())))
        answers = base64.b64encode(file.getvalue()).decode()
        return {"identity": self.identity, "generation": self.generation, "answers": answers}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over `state`, on every rank; answers to other data are dropped and will be decoded anew."""
        self._answers, self._fresh, self.generation = {}, {}, None
        if state["identity"] == self.identity:
            with np.load(io.BytesIO(base64.b64decode(state["answers"])), allow_pickle=False) as arrays:
                self._answers = dict(unpacked_answers(*(arrays[name] for name in ("arr_0", "arr_1", "arr_2"))))
            self.generation = state["generation"]


def remember(batch: Any, answers: Tokens | None) -> None:
    """Puts the model's answers into the batch: another pass over it then decodes nothing and reads the same text."""
    if answers is not None:
        batch["answer"], batch["answer_mask"] = answers


def packed_answers(answers: Iterable[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index and length [n] of each answer, and all tokens one behind the other."""
    pairs = list(answers)
    return (
        np.array([index for index, _ in pairs], np.int64),
        np.array([len(tokens) for _, tokens in pairs], np.int32),
        np.concatenate([np.empty(0, np.int32), *(tokens for _, tokens in pairs)]),
    )


def unpacked_answers(indices: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The inverse of `packed_answers`."""
    return zip(indices.tolist(), np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else [], strict=True)
