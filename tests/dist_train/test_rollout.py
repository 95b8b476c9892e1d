from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dist_train.llm import LanguageModel
from dist_train.packed import TextStates, Tokens
from dist_train.rollout import RolloutCache, answer, remember
from tests import tiny
from tests.dist_train.tiny_llm import all_of, build, imagine, ragged_audio, stock
from tests.ranks import run_ranks


def prefixes(model: LanguageModel, audio: TextStates) -> list[Tensor]:
    """[audio ; prompt] of each row, embedded, without padding."""
    prompt = model.causal.get_input_embeddings()(model.prompt).detach()
    return [torch.cat([states[mask], prompt]) for states, mask in zip(*audio, strict=True)]


def greedy(causal: Any, prefix: Tensor, steps: int, eos: int | None) -> list[int]:
    """Step by step with a KV cache, one clip, no padding."""
    tokens: list[int] = []
    cache, inputs = None, prefix[None]
    while len(tokens) < steps and (not tokens or tokens[-1] != eos):
        output = causal(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        inputs = causal.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
    return tokens


def decode_time_states(causal: Any, prefix: Tensor, tokens: list[int], layer: int) -> Tensor:
    """The state that emits each token, step by step with a KV cache."""
    states, cache, inputs = [], None, prefix[None]
    for token in tokens:
        output = causal(inputs_embeds=inputs, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = output.past_key_values
        states.append(output.hidden_states[layer][0, -1])
        inputs = causal.get_input_embeddings()(torch.tensor([[token]]))
    return torch.stack(states)


def beam(causal: Any, prefix: Tensor, beams: int, steps: int, eos: int, pad: int) -> list[int]:
    """transformers' own search on one clip."""
    ids = causal.generate(
        inputs_embeds=prefix[None],
        attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
        do_sample=False,
        num_beams=beams,
        max_new_tokens=steps,
        eos_token_id=eos,
        pad_token_id=pad,
    )[0].tolist()
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_states_are_those_of_decode_time_of_the_chosen_beam(
    beams: int, layer: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Ragged audio, also none at all; some rows end at once or early, others reach the limit."""
    model = build(tokenizer, {"layer": layer, "max_new_tokens": 7, "beams": beams})
    audio, causal, lengths = ragged_audio(5, 1, 9, 3, 0, 7), stock(model), set()
    model.eos = 299
    said = answers_of(model, audio).ids
    for eos in (int(said[0, 0]), int(said[1, 2]), int(said[2, -2]), 299):
        model.eos = eos
        found, answers = imagine(model, audio)
        assert answers is not None and torch.equal(found.mask, answers.mask)
        for row, prefix in enumerate(prefixes(model, audio)):
            tokens = greedy(causal, prefix, 7, eos) if beams == 1 else beam(causal, prefix, beams, 7, eos, model.pad)
            assert answers.ids[row, answers.mask[row]].tolist() == tokens
            assert answers.mask[row, : len(tokens)].all()
            expected = decode_time_states(causal, prefix, tokens, layer)
            torch.testing.assert_close(found.states[row, : len(tokens)], expected, rtol=0, atol=1e-5)
        lengths |= set(found.mask.sum(1).tolist())
    assert 7 in lengths and len(lengths) > 1


@torch.no_grad()
def test_beams_find_likelier_answers_than_greedy_decoding(tokenizer: PreTrainedTokenizerBase) -> None:
    audio = ragged_audio(*range(1, 21))
    model = build(tokenizer, {"beams": 4})
    causal, sums = stock(model), []
    for beams in (1, 4):
        model.simulation.beams = beams
        answers = model.answers(audio, all_of(audio), None)
        total = 0.0
        for row, prefix in enumerate(prefixes(model, audio)):
            ids = answers.ids[row, answers.mask[row]]
            inputs = torch.cat([prefix, causal.get_input_embeddings()(ids[:-1])])
            surprise = causal(inputs_embeds=inputs[None]).logits[0, len(prefix) - 1 :].log_softmax(-1)
            total += float(surprise.gather(1, ids[:, None]).mean())
        sums.append(total)
    assert sums[1] > sums[0]


def test_decoding_is_by_the_recipe_whatever_the_model_files_say(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain, audio = build(tokenizer), ragged_audio(4, 8, 1)
    plain.causal.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.6,
        num_beams=3,
        repetition_penalty=5.0,
        eos_token_id=[5, 6],
        max_length=9,
    )
    plain.causal.save_pretrained(tmp_path)
    loaded = build(tokenizer, config=None, pretrained=str(tmp_path), tuning="frozen")
    loaded.causal.load_state_dict(plain.causal.state_dict())
    plain.causal.generation_config = GenerationConfig()
    for found, expected in zip(loaded.answers(audio, all_of(audio), None), answers_of(plain, audio), strict=True):
        assert torch.equal(found, expected)


def answers_of(model: LanguageModel, audio: TextStates) -> Tokens:
    return model.answers(audio, all_of(audio), None)


def test_decoding_leaves_every_module_in_the_mode_it_had(tokenizer: PreTrainedTokenizerBase) -> None:
    """Also with activation checkpointing, which would drop the KV cache."""
    for tuning in ("full", "frozen"):
        model = build(tokenizer, tuning=tuning, activation_checkpointing=True).train()
        before = [module.training for module in model.modules()]
        cached: list[bool] = []
        model.causal.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=cached: seen.append(kwargs["past_key_values"] is not None), with_kwargs=True
        )
        answers_of(model, ragged_audio(2, 3))
        assert cached and all(cached)
        assert [module.training for module in model.modules()] == before


def tokens(rows: list[list[int]]) -> Tokens:
    """Padded with 77."""
    width = max(map(len, rows))
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows], dtype=torch.bool)
    ids = torch.tensor([row + [77] * (width - len(row)) for row in rows], dtype=torch.long)
    return Tokens(ids.view(len(rows), width), mask.view(len(rows), width))


some_tokens = st.lists(st.integers(0, 50), max_size=5)


@given(rows=st.lists(st.tuples(st.booleans(), some_tokens, some_tokens.filter(len)), min_size=1, max_size=6))
def test_only_what_is_wanted_and_unknown_is_decoded(rows: list[tuple[bool, list[int], list[int]]]) -> None:
    asked: list[int] = []

    def ask(places: Tensor) -> Tokens:
        asked.extend(places.tolist())
        return tokens([rows[place][2] for place in places])

    wanted = torch.tensor([row[0] for row in rows])
    found = answer(wanted, tokens([row[1] for row in rows]), ask, everywhere=False, filler=99)
    for row, (wants, known, decoded) in enumerate(rows):
        expected = known or (decoded if wants else [99])
        assert found.ids[row, found.mask[row]].tolist() == expected
        assert found.mask[row, : len(expected)].all() and (found.ids[row, len(expected) :] == 99).all()
    assert asked == [row for row, (wants, known, _) in enumerate(rows) if wants and not known]


# ---- the cache


def batch(indices: list[int], **changes: Any) -> dict[str, Any]:
    flags = torch.ones(len(indices), dtype=torch.bool)
    dropped = torch.tensor([[False, True, False]] * len(indices))
    return {"index": torch.tensor(indices), "real": flags, "audio_present": flags, "dropped": dropped, **changes}


def known(cache: RolloutCache, indices: list[int], epoch: int) -> list[list[int]]:
    made = batch(indices)
    cache.fill(made, epoch)
    return [ids[mask].tolist() for ids, mask in zip(made["answer"], made["answer_mask"], strict=True)]


def say(cache: RolloutCache, said: dict[int, list[int]], **changes: Any) -> None:
    made = batch(list(said), **changes)
    remember(made, tokens(list(said.values())))
    cache.store(made)


@pytest.mark.usefixtures("world_of_one")
def test_answers_are_kept_for_the_epochs_of_a_generation() -> None:
    cache = RolloutCache("data", 3)
    cache.begin_epoch(0)
    say(cache, {4: [7, 8, 9], 2: [5]})
    assert known(cache, [2, 3, 4], 0) == [[5], [], [7, 8, 9]]
    for epoch in (1, 2):
        cache.begin_epoch(epoch)
        assert known(cache, [4, 4, 0], epoch) == [[7, 8, 9], [7, 8, 9], []]
    cache.begin_epoch(3)
    assert known(cache, [2, 3, 4], 3) == [[], [], []] and len(cache) == 0


@pytest.mark.usefixtures("world_of_one")
def test_answers_of_another_generation_cannot_be_read() -> None:
    cache = RolloutCache("data", 2)
    with pytest.raises(RuntimeError, match="begin_epoch"):
        cache.fill(batch([1]), 0)
    cache.begin_epoch(1)
    say(cache, {1: [3]})
    with pytest.raises(RuntimeError, match="generation 0, epoch 2"):
        cache.fill(batch([1]), 2)


@pytest.mark.usefixtures("world_of_one")
def test_fillers_and_clips_that_were_not_asked_are_not_kept() -> None:
    cache = RolloutCache("data", 2)
    cache.begin_epoch(0)
    say(cache, {1: [3], 2: [4], 3: [5]}, real=torch.tensor([True, False, True]))
    say(cache, {4: [6], 5: [7]}, audio_present=torch.tensor([True, False]))
    say(cache, {6: [8], 7: [9]}, dropped=torch.tensor([[True, False, False], [False, True, False]]))
    assert known(cache, [1, 2, 3, 4, 5, 6, 7], 0) == [[3], [], [5], [6], [], [], [9]]


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("clips", [0, 1, 50])
def test_a_checkpoint_keeps_every_answer(clips: int) -> None:
    rng = np.random.default_rng()
    said = {int(i): rng.integers(0, 2**31 - 1, rng.integers(1, 9)).tolist() for i in rng.integers(0, 2**40, clips)}
    cache = RolloutCache("data", 4)
    cache.begin_epoch(9)
    if said:
        say(cache, said)
    state = json.loads(json.dumps(cache.state()))
    again = RolloutCache("data", 4)
    again.restore(state)
    with pytest.raises(RuntimeError):
        again.fill(batch([0]), 0)
    again.begin_epoch(10)
    assert len(again) == len(said)
    if said:
        assert known(again, list(said), 10) == list(said.values())
    again.restore(state)
    again.begin_epoch(12)  # the next generation
    assert len(again) == 0
    other = RolloutCache("other data", 4)
    other.restore(state)
    other.begin_epoch(9)
    assert len(other) == 0


@pytest.mark.usefixtures("world_of_one")
def test_an_answer_takes_few_bytes() -> None:
    cache = RolloutCache("data", 1)
    cache.begin_epoch(0)
    say(cache, {i: ids.tolist() for i, ids in enumerate(np.random.default_rng().integers(0, 32_000, (2000, 30)))})
    assert len(cache.state()["answers"]) < 2000 * 30 * 4


# ---- ranks


@pytest.mark.parametrize("rollout", ["cached", pytest.param("generate", marks=pytest.mark.slow)])
def test_ranks_under_zero_3_decode_alike_with_answers_of_unequal_length(rollout: str, tmp_path: Path) -> None:
    """Two ranks, parameters sharded: answers and losses are those of whole models (ZeRO-0), though in `cached` one rank
    has something to decode where the other has not.
    """
    data = tiny.write_corpus(tmp_path / "shards")
    found = run_ranks("rollouts", 2, tmp_path, module="tests.dist_train.work_llm", data=str(data), rollout=rollout)
    for rank, (whole, parts) in enumerate(zip(found["0"], found["3"], strict=True)):
        assert [row["answers"] for row in parts] == [row["answers"] for row in whole]
        for row, expected in zip(parts, whole, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        decoded = [row["decoded"] for row in whole], [row["decoded"] for row in parts]
        if rollout == "generate":
            assert decoded == ([True] * 4, [True] * 4)
        else:  # step 0: both; step 1: rank 1 alone; steps 2 and 3: none, whatever rank a clip is on
            assert decoded == ([True, rank == 1, False, False], [True, True, False, False])
    lengths = [[len(ids) for ids in rank[0]["answers"]] for rank in found["3"]]
    assert max(lengths[0]) != max(lengths[1])
