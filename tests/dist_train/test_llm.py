from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    WavLMConfig,
    WavLMModel,
)

from dist_train.llm import (
    LanguageModel,
    Projector,
    SimulationSettings,
    TextFeatures,
    TextSettings,
    TextStates,
    load_tokenizer,
)
from sharding.errors import UserError
from tests import tiny

LAYERS, WIDTH = 3, 16


def text_settings(**changes: Any) -> TextSettings:
    return TextSettings(**{**tiny.recipe(Path("none")).text.model_dump(), **changes})


def build(tokenizer: PreTrainedTokenizerBase, simulation: dict[str, Any] | None = None, **text: Any) -> LanguageModel:
    """Weights large enough that greedy answers vary, float64 so that none is decided by rounding."""
    settings = SimulationSettings(**{"layer": -2, "prompt": "Say:", "max_new_tokens": 6, **(simulation or {})})
    model = LanguageModel(text_settings(**text), settings, tokenizer).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    return model


def ragged_audio(*lengths: int) -> TextStates:
    """Projected audio of the given lengths; what stands in the padding must not matter."""
    rows = [torch.randn(length, WIDTH, dtype=torch.float64) for length in lengths]
    padded = pad_sequence(rows, batch_first=True, padding_value=9.0)
    return TextStates(padded, torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None])


def greedy(causal: Any, prefix: Tensor, layer: int, steps: int, eos: int | None) -> tuple[list[int], Tensor]:
    """Step by step with a KV cache, one clip, no padding: answer tokens, and the state that emitted each."""
    tokens, states, cache, inputs = [], [], None, prefix[None]
    for _ in range(steps):
        output = causal(inputs_embeds=inputs, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = output.past_key_values
        states.append(output.hidden_states[layer][0, -1])
        tokens.append(int(output.logits[0, -1].argmax()))
        if tokens[-1] == eos:
            break
        inputs = causal.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
    return tokens, torch.stack(states)


@pytest.mark.parametrize("layers", [1, LAYERS, LAYERS + 1])
def test_real_text_is_the_sum_of_the_last_states_of_the_stock_model(
    layers: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(tokenizer, layers=layers)
    stock = LlamaForCausalLM(model.causal.config).eval().double()
    stock.load_state_dict(model.causal.state_dict())
    rows = [torch.randint(3, 300, (length,)) for length in (1, 7, 4)]
    tokens = pad_sequence(rows, batch_first=True, padding_value=5)
    mask = torch.arange(7) < torch.tensor([[1], [7], [4]])
    found = model.real(tokens, mask)
    assert torch.equal(found.mask, mask)
    for row, alone in enumerate(rows):
        states = stock(alone[None], output_hidden_states=True).hidden_states
        expected = sum(states[len(states) - layers :][i][0] for i in range(layers))
        torch.testing.assert_close(found.states[row, mask[row]], expected, rtol=0, atol=1e-5)


def test_projector_stacks_five_frames_and_drops_the_rest() -> None:
    settings = SimulationSettings(projector_width=11)
    projector = Projector(3, 4, settings)
    frames, lengths = torch.randn(4, 23, 3), torch.tensor([23, 20, 9, 4])
    found = projector(frames, torch.arange(23) < lengths[:, None])
    assert found.states.shape == (4, 4, 4)
    assert found.mask.sum(1).tolist() == [4, 4, 1, 0]
    for row in range(4):
        for position in range(4):
            stacked = torch.cat([frames[row, 5 * position + i] for i in range(5)])
            hidden = torch.relu(projector.linear1.weight @ stacked + projector.linear1.bias)
            expected = projector.linear2.weight @ hidden + projector.linear2.bias
            torch.testing.assert_close(found.states[row, position], expected)


def test_the_projector_of_the_paper_has_its_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Projector(1024, 4096, SimulationSettings()).parameters()) == 18_880_512


@pytest.mark.parametrize("layer", [1, -1])
def test_prefix_states_are_those_at_the_audio_positions_before_the_prompt(
    layer: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, audio = build(tokenizer, {"layer": layer}), ragged_audio(6, 2, 4)
    found = model.prefix(audio)
    prompt = torch.tensor([tokenizer.bos_token_id, *tokenizer("Say:", add_special_tokens=False).input_ids])
    for row in range(3):
        clip = audio.states[row, audio.mask[row]]
        inputs = torch.cat([clip, model.causal.get_input_embeddings()(prompt)])
        states = model.causal(inputs_embeds=inputs[None], output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(found.states[row, audio.mask[row]], states[0, : len(clip)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2])
def test_generated_states_are_those_of_decode_time(layer: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ragged audio, also none at all; some rows end at once or early, others reach the limit."""
    model, audio = build(tokenizer, {"layer": layer, "max_new_tokens": 7}), ragged_audio(5, 1, 9, 3, 0, 7)
    causal = model.causal
    prompt = causal.get_input_embeddings()(model.prompt).detach()
    prefixes = [torch.cat([audio.states[row, audio.mask[row]], prompt]) for row in range(6)]
    with torch.no_grad():
        endless = [greedy(causal, prefix, layer, 7, None)[0] for prefix in prefixes]
        lengths = set()
        for eos in (endless[0][0], endless[1][2], endless[2][5], 299):
            model.eos = eos
            found = model.generate(audio)
            expected = [greedy(causal, prefix, layer, 7, eos) for prefix in prefixes]
            assert found.mask.sum(1).tolist() == [len(tokens) for tokens, _ in expected]
            for row, (tokens, states) in enumerate(expected):
                assert model.decode(audio)[row, : len(tokens)].tolist() == tokens
                assert found.mask[row, : len(tokens)].all()
                torch.testing.assert_close(found.states[row, : len(tokens)], states, rtol=0, atol=1e-5)
            lengths |= set(found.mask.sum(1).tolist())
    assert {1, 7} <= lengths and len(lengths) > 2


def test_greedy_tokens_are_those_of_generate_on_each_clip_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model, audio = build(tokenizer), ragged_audio(4, 8, 1)
    answer = model.decode(audio)
    assert answer.shape == (3, 6)
    prompt = model.causal.get_input_embeddings()(model.prompt)
    for row in range(3):
        inputs = torch.cat([audio.states[row, audio.mask[row]], prompt])[None]
        alone = model.causal.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=model.eos,
            pad_token_id=model.pad,
        )
        assert answer[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_imagined_text_trains_the_projector_and_the_model(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    projector = Projector(3, WIDTH, SimulationSettings(projector_width=8)).double()
    frames, mask = torch.randn(3, 30, 3, dtype=torch.float64), torch.arange(30) < torch.tensor([[30], [12], [5]])
    for rollout in ("generate", "prefix"):
        model: Any = build(tokenizer).train()
        projector.zero_grad()
        getattr(model, rollout)(projector(frames, mask)).states.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
        assert model.causal.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
        assert all(module.training for module in model.modules())


def test_decoding_is_greedy_whatever_the_model_files_say(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
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
    loaded = build_without_noise(tokenizer, config=None, pretrained=str(tmp_path), tuning="frozen")
    plain.causal.generation_config = GenerationConfig()
    assert torch.equal(loaded.decode(audio), plain.decode(audio))
    torch.testing.assert_close(loaded.generate(audio).states, plain.generate(audio).states)


def build_without_noise(tokenizer: PreTrainedTokenizerBase, **text: Any) -> LanguageModel:
    simulation = SimulationSettings(layer=-2, prompt="Say:", max_new_tokens=6)
    return LanguageModel(text_settings(**text), simulation, tokenizer).eval().double()


def test_a_frozen_model_stays_in_evaluation_mode(tokenizer: PreTrainedTokenizerBase) -> None:
    config = {**(text_settings().config or {}), "attention_dropout": 0.5}
    frozen = build_without_noise(tokenizer, config=config, tuning="frozen").train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen.generate(ragged_audio(2, 3))
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize(("rollout", "layer"), [("prefix", 2), ("prefix", -1), ("generate", 1), ("none", -4)])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_nothing_trainable_is_out_of_reach_when_the_real_text_is_features(
    rollout: str, layer: int, tuning: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    lora = {"target_modules": ["q_proj", "down_proj"]}
    for tied in (False, True):
        config = {**(text_settings().config or {}), "tie_word_embeddings": tied}
        model = build(
            tokenizer, {"rollout": rollout, "layer": layer}, input="features", tuning=tuning, lora=lora, config=config
        )
        if rollout != "none":
            getattr(model, rollout)(ragged_audio(3, 2)).states.square().sum().backward()
        idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle
        assert any(p.requires_grad for p in model.parameters()) == (rollout != "none")


def test_text_features_enter_through_a_linear_layer() -> None:
    layer, features = TextFeatures(5, WIDTH), torch.randn(2, 3, 5)
    mask = torch.ones(2, 3, dtype=torch.bool)
    found = layer(features, mask)
    torch.testing.assert_close(found.states, features @ layer.linear.weight.T + layer.linear.bias)
    assert found.mask is mask


def test_layers_outside_the_model_are_refused_where_they_are_used(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"text\.layers.*at most 4"):
        build(tokenizer, layers=LAYERS + 2)
    for layer in (LAYERS + 1, -LAYERS - 2):
        with pytest.raises(UserError, match=r"simulation\.layer.*from -4 to 3"):
            build(tokenizer, {"layer": layer})
    build(tokenizer, {"rollout": "none", "layer": 30})
    build(tokenizer, layers=30, input="features")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"text\.tokenizer: has 3\d\d tokens, the language model knows 100"):
        build(tokenizer, config={**(text_settings().config or {}), "vocab_size": 100})


def test_what_cannot_be_loaded_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    WavLMModel(WavLMConfig(**small, conv_dim=[4] * 7, num_conv_pos_embedding_groups=2)).save_pretrained(
        tmp_path / "wavlm"
    )
    LlamaForCausalLM(LlamaConfig(**small, vocab_size=400)).save_pretrained(tmp_path / "cut")
    LlamaConfig(**{**small, "num_hidden_layers": 2}, vocab_size=400).save_pretrained(tmp_path / "cut")
    for folder in ("wavlm", "cut", "absent"):
        with pytest.raises(UserError, match=rf"text\.pretrained.*{folder}"):
            build(tokenizer, config=None, pretrained=str(tmp_path / folder))
    (tmp_path / "text.model").write_text("no model")
    for name in ("text.model", "absent", "wavlm"):
        with pytest.raises(UserError, match=rf"text\.tokenizer.*{name}"):
            load_tokenizer(str(tmp_path / name))
