"""CMPT: tokens inside real speech encoders, proxies in the place of what is missing, the alignment loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dist_train.audio import AudioEncoder, AudioSettings
from dist_train.build import build_collator, build_model
from dist_train.cmpt import CMPT, Pooled
from dist_train.losses import alignment_loss
from dist_train.names import MODALITIES
from dist_train.recipe import validate
from sharding.errors import UserErrors
from tests import tiny

BASE: dict[str, Any] = tiny.recipe(Path("none")).audio.config or {}


def encoder(kind: str, tokens: int, **changes: Any) -> AudioEncoder:
    settings = AudioSettings.model_validate({"config": {**BASE, "model_type": kind}, "layer": 2, **changes})
    torch.manual_seed(5)
    return AudioEncoder(settings, minimum_frames=1, needs_last=True, tokens=tokens).eval()


@pytest.mark.parametrize("kind", ["wavlm", "hubert", "wav2vec2"])
def test_tokens_read_the_clip_alone_and_leave_its_frames_in_place(kind: str) -> None:
    """In float64: as many frames as without, no influence of padding; and what enters the first layer is as without."""
    model, plain = encoder(kind, 2).double(), encoder(kind, 0).double()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "tokens"})
    waveform = torch.randn(2, 8000, dtype=torch.float64)
    mask = torch.arange(8000) < torch.tensor([[8000], [5000]])
    entered: list[torch.Tensor] = []
    for one in (model, plain):
        one.model.encoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    found, reference = model(waveform, mask), plain(waveform, mask)
    assert found.proxies is not None and found.proxies.shape == (2, 2, model.width)
    assert found.stream.shape == reference.stream.shape and torch.equal(found.mask, reference.mask)
    torch.testing.assert_close(entered[0][:, 2:], entered[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found.stream, reference.stream, atol=1e-6)  # frames see the tokens, too
    alone = model(waveform[1:, :5000], mask[1:, :5000])
    torch.testing.assert_close(alone.proxies, found.proxies[1:], rtol=1e-8, atol=1e-8)
    assert not torch.allclose(found.proxies[0], found.proxies[1])
    again = plain(waveform, mask)  # a token of one call is not left behind
    torch.testing.assert_close(again.stream, reference.stream)


def test_tokens_learn_in_a_frozen_encoder_and_through_rank_1_adapters() -> None:
    for tuning in ("frozen", "lora", "dora", "vera"):
        model = encoder("wavlm", 1, tuning=tuning, lora={"rank": 1, "alpha": 1}).train()
        states = model(torch.randn(1, 6000), torch.ones(1, 6000, dtype=torch.bool))
        assert states.proxies is not None and model.tokens is not None
        states.proxies.square().sum().backward()
        assert model.tokens.grad is not None and model.tokens.grad.any()
        adapters = [p for name, p in model.named_parameters() if p.requires_grad and name != "tokens"]
        assert bool(adapters) == (tuning != "frozen")


def proxies(cmpt: CMPT, rows: int) -> tuple[Pooled, dict[str, torch.Tensor]]:
    sequences = [torch.randn(rows, steps, 8) for steps in (4, 3, 2)]
    masks = [torch.ones(x.shape[:2], dtype=torch.bool) for x in sequences]
    made = cmpt(sequences, masks, torch.randn(rows, len(cmpt.targets), 6))
    return Pooled(sequences, masks, [torch.randn(rows, 8) for _ in range(3)]), made


def test_what_is_dropped_becomes_the_mean_of_its_proxies_in_what_is_there() -> None:
    """All combinations of present and dropped."""
    cmpt = CMPT(MODALITIES, 6, 8, heads=2, dropout=0.0)
    cases = list(itertools.product([False, True], repeat=6))
    seen, made = proxies(cmpt, len(cases))
    present, dropped = (torch.tensor([case[part : part + 3] for case in cases]) for part in (0, 3))
    filled = cmpt.fill(seen, made, present, dropped)
    of = {(source, target): proxy for source, target, proxy in cmpt.pairs(made)}
    assert set(of) == set(itertools.permutations(range(3), 2))
    for row, target in itertools.product(range(len(cases)), range(3)):
        sources = [s for s in range(3) if s != target and present[row, s] and not dropped[row, s]]
        expected = seen.vectors[target][row]
        first = seen.sequences[target][row, 0]
        if dropped[row, target] and sources:
            expected = first = torch.stack([of[source, target][row] for source in sources]).mean(0)
        torch.testing.assert_close(filled.vectors[target][row], expected)
        torch.testing.assert_close(filled.sequences[target][row, 0], first)
        assert torch.equal(filled.sequences[target][row, 1:], seen.sequences[target][row, 1:])


@pytest.mark.parametrize("targets", [("text",), ("audio",), MODALITIES])
def test_no_proxy_without_a_purpose(targets: tuple[str, ...]) -> None:
    cmpt = CMPT(targets, 6, 8, heads=2, dropout=0.0)
    seen, made = proxies(cmpt, 5)
    assert {MODALITIES[target] for _, target, _ in cmpt.pairs(made)} == set(targets)
    loss = alignment_loss(cmpt.distances(seen.vectors, made, torch.ones(5, 3, dtype=torch.bool)), 1e-12)
    loss.backward()
    assert not [name for name, p in cmpt.named_parameters() if p.grad is None or not p.grad.any()]


def test_alignment_by_definition() -> None:
    cmpt = CMPT(MODALITIES, 6, 8, heads=2, dropout=0.0)
    seen, made = proxies(cmpt, 5)
    present = torch.ones(5, 3, dtype=torch.bool)
    present[3, 1] = False  # no complete clip: it does not count
    rows, to_target, to_own = [0, 1, 2, 4], 0.0, []
    for source, target, proxy in cmpt.pairs(made):
        to_target += (proxy - seen.vectors[target])[rows].square().mean().item()
        to_own.append((proxy - seen.vectors[source])[rows].square().mean().item())
    found = alignment_loss(cmpt.distances(seen.vectors, made, present), 1e-12)
    assert found.item() == pytest.approx(to_target / (sum(to_own) / 6), rel=1e-5)
    assert alignment_loss(torch.zeros(2, 6, 3), 1e-12).item() == 0


def test_the_missing_flow_hears_through_the_proxies(tokenizer: PreTrainedTokenizerBase) -> None:
    """Text is missing: its proxies in audio and vision decide; in the complete flow they play no part."""
    recipe = tiny.recipe(
        Path("none"),
        widths={"vision": tiny.VISION_WIDTH},
        imagination={"kind": "cmpt", "heads": 2},
        simulation={"rollout": "none"},
    )
    model = build_model(recipe, tokenizer).eval()
    clips = [{"key": "k", "index": 0, "real": True, **tiny.clip(np.random.default_rng())}]
    batch = build_collator(recipe, tokenizer, model)(clips)
    before = model(batch)
    with torch.no_grad():
        for name in ("audio.tokens", "fusion.cmpt.branches.vision.tokens"):
            model.get_parameter(name).add_(1.0)
    after = model(batch)
    assert not torch.allclose(before.missing.prediction, after.missing.prediction)
    assert before.notes["alignment"].shape == (1, 2, 3)


def test_recipes_that_cannot_be() -> None:
    values = tiny.recipe(Path("none")).model_dump()
    values["imagination"] = {"kind": "cmpt", "heads": 3}
    values["audio"]["config"]["model_type"] = "whisper"
    with pytest.raises(UserErrors) as caught:
        validate(values)
    told = str(caught.value)
    assert "simulation.rollout: is prefix, and imagination: cmpt has proxies" in told
    assert "imagination.heads: is 3" in told
